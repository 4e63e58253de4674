"""What a point of suite "model" runs: a prefill, a decoding step or a training step.

Legend: B rows, T tokens, V vocabulary.
"""

import importlib.util
import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from attnlab.cache import ModelCache
from attnlab.model import HybridLM
from attnlab.testing import Accuracy
from attnlab.training import objective
from attnlab.training.optimizer import MasterAdamW
from attnlab.training.packing import Pack
from bench import models
from bench.calls import Call
from bench.gate import Results, Verdict
from bench.inputs import Source, check_corpus, corpus_bytes
from bench.model_costs import Work, needed_bytes
from bench.model_engines import (
    CHUNK,
    FILL,
    Context,
    Engine,
    Ours,
    Theirs,
    chunks,
    extend,
    restore_states,
    set_length,
    states,
    stepper,
)
from bench.model_gate import (
    KEPT,
    PIECE,
    judge_logits,
    other_backends,
    verdict_beside,
    verdict_of,
)
from bench.model_parts import PartTimer
from bench.rows import Point, Row

__all__ = ["PASSES", "needed_bytes", "prepare", "problem_of", "why_not"]

PASSES = ("prefill", "decode", "train")
GRADIENTS_LEN = 1024  # tokens over which gradients are judged: the definitions are quadratic
NEW_TOKENS = 64  # that follow a prefill
PAIR_LEN = 2048  # tokens over which transformers is compared in float32


def problem_of(point: Point, device: str) -> Work:
    """The point's work, as `bench.calls` gives that of an op."""
    return Work(point)


def why_not(point: Point, device: str) -> str | None:
    """Why the point can't run here, or None."""
    if point.backend == models.PEER and importlib.util.find_spec(models.PEER) is None:
        return "transformers is not installed"
    if point.pass_ == "train" and point.dtype == "float16":
        return "small gradients vanish in float16, and the trainer scales no losses"
    return None


def prepare(point: Point, source: Source, device: str) -> Call:
    """Make the model and its tokens, and the call on them."""
    makers = {"prefill": _prefill, "decode": _decode, "train": _train}
    make = _peer if point.backend == models.PEER else makers[point.pass_]
    return make(point, source, device)


def token_ids(point: Point, source: Source, num_tokens: int, device: str) -> Tensor:
    """`[B, T]` ids: bytes of the corpus, one row after the other, or random ones."""
    if source.kind == "random":
        generator = torch.Generator().manual_seed(source.seed)
        vocab_size = models.config_of(str(point.model)).vocab_size
        ids = torch.randint(vocab_size, (point.batch, num_tokens), generator=generator)
    else:
        count = point.batch * num_tokens
        check_corpus(source.corpus, count)
        data = corpus_bytes(source.corpus)[:count].astype(np.int64)
        ids = torch.from_numpy(data).view(point.batch, num_tokens)
    return ids.to(device)


def _prefill(point: Point, source: Source, device: str) -> Call:
    ids = token_ids(point, source, point.q_len, device)
    model = models.build(str(point.model), getattr(torch, point.dtype), device)
    before: list = []
    notes: Row = {}

    def compute() -> Results:
        # What the first passes prepare would count as part of their layers; further ones are alike.
        Ours(model).prefill(ids[:, : 2 * CHUNK], 1)
        cache = model.new_cache(point.batch, point.q_len + NEW_TOKENS)
        *earlier, last = chunks(point.q_len, CHUNK)
        with PartTimer(model, device) as parts:
            if earlier:
                extend(model, cache, ids, earlier, 1)
            before[:] = cache, states(cache), last
            logits = extend(model, cache, ids, [last], KEPT)
        notes["parts_ms"] = parts.ms()
        return {"logits": logits}

    def judge(results: Results) -> Verdict:
        """The last chunk once more, in pieces, from the states before it; and what comes next."""
        cache, saved, last = before
        before.clear()
        notes["new_tokens"] = greedy(model, cache, results["logits"][:, -1])
        set_length(cache, last.start)
        restore_states(cache, saved)
        size = min(PIECE, 1 + (last.stop - last.start) // 3)
        pieces = chunks(last.stop, size, start=last.start)
        with other_backends(model, "torch", "sdpa"):
            again = extend(model, cache, ids, pieces, KEPT)
        return judge_logits(results["logits"], again, point.dtype)

    run = partial(Ours(model).prefill, ids, 1)
    return Call(run, compute, judge, num_bytes_of(*model.parameters()), notes)


def _decode(point: Point, source: Source, device: str) -> Call:
    model = models.build(str(point.model), getattr(torch, point.dtype), device)
    ids = token_ids(point, source, min(point.q_len, FILL) + KEPT, device)
    context, new = Ours(model).context(ids[:, :-KEPT], point.q_len, KEPT), ids[:, -KEPT:]
    run = partial(first_step, context, new)

    def judge(results: Results) -> Verdict:
        """The tokens once more, all in one pass."""
        context.restore()
        with other_backends(model, "torch", "sdpa"):
            again = extend(model, context.cache, new, [slice(KEPT)], KEPT)
        return judge_logits(results["logits"], again, point.dtype)

    size = num_bytes_of(*model.parameters()) + context.cache.num_bytes
    return Call(run, lambda: {"logits": steps(context, new)}, judge, size)


def _peer(point: Point, source: Source, device: str) -> Call:
    """A call of transformers' model, which is judged by ours."""
    engine = Theirs(models.build_peer(str(point.model), getattr(torch, point.dtype), device))
    size = num_bytes_of(*engine.model.parameters())

    def judge(results: Results) -> Verdict:
        if point.dtype != "float32":
            return _verdict_in_float32(_short(point), source, device)
        expected = last_logits(_ours_of(point, device), point, ids)
        return judge_logits(results["logits"], expected, point.dtype)

    if point.pass_ == "prefill":
        ids = token_ids(point, source, point.q_len, device)
        run = partial(engine.prefill, ids, 1)
        return Call(run, lambda: {"logits": engine.prefill(ids, KEPT)}, judge, size)
    ids = token_ids(point, source, min(point.q_len, FILL) + KEPT, device)
    context, new = engine.context(ids[:, :-KEPT], point.q_len, KEPT), ids[:, -KEPT:]
    run = partial(first_step, context, new)
    return Call(run, lambda: {"logits": steps(context, new)}, judge, size)


def greedy(model: HybridLM, cache: ModelCache, logits: Tensor) -> list[list[int]]:
    """The first `NEW_TOKENS` ids of each row's continuation, given the logits `[B, V]` behind it."""
    step, found = stepper(model, cache), [logits.argmax(-1)]
    while len(found) < NEW_TOKENS:
        found.append(step(found[-1]).argmax(-1))
    return torch.stack(found, 1).tolist()


@lru_cache
def _verdict_in_float32(point: Point, source: Source, device: str) -> Verdict:
    """Verdict on their model and ours, both in float32, at a short length.

    In 16 bits transformers rounds decays and states, so its logits are its own; that it has the
    config and the weights of ours is seen in float32.
    """
    count = point.q_len if point.pass_ == "prefill" else point.q_len + KEPT
    ids = token_ids(point, source, count, device)
    ours = _ours_of(point, device)
    logits = [last_logits(x, point, ids) for x in (Theirs(models.to_peer(ours.model)), ours)]
    return judge_logits(*logits, point.dtype)


def _short(point: Point) -> Point:
    return replace(point, batch=1, q_len=min(point.q_len, PAIR_LEN), dtype="float32")


def _ours_of(point: Point, device: str) -> Ours:
    """Our model of the weights of theirs."""
    name = str(point.model).removeprefix(f"{models.PEER}-")
    return Ours(models.build(name, getattr(torch, point.dtype), device))


def last_logits(engine: Engine, point: Point, ids: Tensor) -> Tensor:
    """Logits `[B, KEPT, V]` that a point of the passes prefill and decode is judged by."""
    if point.pass_ == "prefill":
        return engine.prefill(ids, KEPT)
    return steps(engine.context(ids[:, :-KEPT], point.q_len, KEPT), ids[:, -KEPT:])


def first_step(context: Context, tokens: Tensor) -> Tensor:
    """The step that is timed: from the end of the context, over and over."""
    context.rewind()
    return context.step(tokens[:, 0])


def steps(context: Context, tokens: Tensor) -> Tensor:
    """Logits `[B, T, V]` of `tokens` `[B, T]`, one step each, from the context as it was made."""
    context.restore()
    return torch.stack([context.step(column).clone() for column in tokens.unbind(1)], 1)


def _train(point: Point, source: Source, device: str) -> Call:
    model = models.build.__wrapped__(str(point.model), torch.float32, device).train()
    optimizer = MasterAdamW(model, dtype=getattr(torch, point.dtype), weight_decay=0.1)
    ids = token_ids(point, source, point.q_len + 1, device)

    def step(ids: Tensor) -> Tensor:
        loss = objective.backward(model, pack_of(ids), num_targets=ids.shape[1] - 1)
        optimizer.collect_gradients()
        optimizer.step(learning_rate=0.0, clip_norm=1.0)  # as dear as any other, and repeatable
        return loss

    step(ids[:, :2])  # makes the moments

    def judge(results: Results) -> Verdict:
        """Gradients of the first tokens against those of the definitions; the loss is a number."""
        if not results["loss"].isfinite():
            return Verdict(Accuracy(*[math.inf] * 3), "loss")
        short = ids[:, : GRADIENTS_LEN + 1]
        actual = gradients(model, short)
        with other_backends(model, "reference", "reference"):
            plain = gradients(model, short)
        if point.dtype == "float32":
            return verdict_of("gradients", actual, plain, point.dtype)
        return verdict_beside("gradients", actual, plain, gradients(in_float32(model), short))

    moments = [x for state in optimizer.adamw.state.values() for x in state.values()]
    size = num_bytes_of(*model.parameters(), *optimizer.masters.values(), *moments)
    return Call(partial(step, ids), lambda: {"loss": step(ids)}, judge, size)


def gradients(model: HybridLM, ids: Tensor) -> list[Tensor]:
    """Gradients of the mean loss of `ids` `[1, T+1]`, a vector a parameter; none are left behind."""
    objective.backward(model, pack_of(ids), num_targets=ids.shape[1] - 1)
    found = [x.grad.flatten() for x in model.parameters() if x.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def in_float32(model: HybridLM) -> HybridLM:
    """The same weights in a model that computes by the ops' definitions in float32."""
    weight = model.lm_head.weight
    wide = HybridLM(model.config, device=weight.device, dtype=torch.float32).train()
    wide.load_state_dict(model.state_dict())
    return wide.use_backend("reference", "reference")


def pack_of(ids: Tensor) -> Pack:
    """One document `[1, T+1]` as a pack of T tokens with T targets."""
    count = ids.shape[1] - 1
    bounds = torch.tensor([0, count], dtype=torch.int32)
    return Pack(ids[:, :-1], ids[0, 1:], bounds, count)


def num_bytes_of(*tensors: Tensor) -> int:
    """Bytes of the tensors, one that comes twice counted once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
