"""Generation: prompts into a cache, then token after token.

Legend: B rows, T tokens, N packed prompts, V vocabulary.

A prompt is stored whole or in chunks, with the same logits; a chunk bounds what a long prompt needs
of memory beside the cache. Prompts of unequal length are left-padded or packed; the model packs
padded ones too, so that a row's tokens are those it would get alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from attnlab.cache import ModelCache
from attnlab.checks import check_cu_seqlens, check_cu_seqlens_values, expect
from attnlab.inference.graph import GraphedStep, can_capture
from attnlab.inference.sampling import check_sampling, sample
from attnlab.model.hybrid import HybridLM
from attnlab.model.placement import check_ids, left_padding

__all__ = ["decode_step", "generate", "prefill", "prefill_packed", "sample", "stream", "unpadded"]

Prompts = Sequence[Sequence[int]]


def prefill(
    model: HybridLM,
    cache: ModelCache,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Logits `[B, V]` behind each row's last token; the cache has stored all tokens.

    Args:
        model: in eval mode.
        cache: with one row a prompt; a row goes on behind what it has seen.
        input_ids: `[B, T]` integers.
        attention_mask: `[B, T]`, 0 at padding, which must come first.
        chunk_size: tokens a row in one pass, None for all.

    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, padding after a token, or a
            prompt longer than the cache; nothing has been written then.
    """
    check_ids(input_ids, model.config.vocab_size)
    rows, num_tokens = input_ids.shape
    chunk = _checked_chunk(chunk_size, num_tokens)
    mask = left_padding(attention_mask, input_ids)  # on the CPU
    counts = [num_tokens] * rows if mask is None else mask.sum(1).tolist()
    _check_none_empty(counts)
    cache.check_room(counts)
    first = num_tokens - max(counts)  # columns before it are padding in every row
    for part in _slices(first, num_tokens, chunk):
        part_mask = None if mask is None else mask[:, part]
        output = model(input_ids[:, part], cache=cache, attention_mask=part_mask, logits_to_keep=1)
    return output.logits[:, -1]


def prefill_packed(
    model: HybridLM,
    cache: ModelCache,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Logits `[N, V]` behind the last token of each prompt; prompt n is stored in cache row n.

    Args:
        model: in eval mode.
        cache: of N rows; a row goes on behind what it has seen.
        input_ids: `[1, T]` integers, the prompts end to end.
        cu_seqlens: `[N+1]` int32 or int64, their bounds.
        chunk_size: tokens of all prompts together in one pass, None for all.

    Raises:
        ValueError: as `prefill`, and for bounds that don't fit.
    """
    check_ids(input_ids, model.config.vocab_size)
    expect(input_ids.shape[0] == 1, "packed tokens of batch 1", input_ids.shape[0])
    num_tokens = input_ids.shape[1]
    chunk = _checked_chunk(chunk_size, num_tokens)
    check_cu_seqlens(cu_seqlens, "cu_seqlens", input_ids.device)
    bounds = cu_seqlens.long().cpu()
    check_cu_seqlens_values(bounds, "cu_seqlens", num_tokens)
    counts = bounds.diff().tolist()
    _check_none_empty(counts)
    cache.check_room(counts)
    logits = None
    for part in _slices(0, num_tokens, chunk):
        cut = bounds.clamp(part.start, part.stop) - part.start
        output = model(input_ids[:, part], cache=cache, cu_seqlens=cut, logits_to_keep=1)
        new = output.logits[0]  # [N, V], 0 for prompts without tokens here
        here = (cut.diff() > 0)[:, None].to(new.device)
        logits = new if logits is None else torch.where(here, new, logits)
    assert logits is not None
    return logits


def decode_step(model: HybridLM, cache: ModelCache, tokens: Tensor) -> Tensor:
    """Logits `[B, V]` behind one more token a row, `tokens` `[B]`, which the cache has stored.

    Raises:
        ValueError: for another shape, ids outside the vocabulary (on the CPU), or a full cache.
    """
    expect(tokens.ndim == 1, "tokens of shape [B]", list(tokens.shape))
    return model(tokens[:, None], cache=cache).logits[:, -1]


def stream(
    model: HybridLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    use_cuda_graph: bool = True,
) -> Iterator[Tensor]:
    """Tokens `[B]` int64 of all rows, step after step; a row that has ended repeats its last one.

    Arguments and errors are those of `generate`; they are checked at the call. Whoever wants less
    than `max_new_tokens` stops iterating.
    """
    check_sampling(temperature, top_k, top_p)
    expect(max_new_tokens >= 1, "max_new_tokens of at least 1", max_new_tokens)
    ok = seed is None or -(2**63) <= seed < 2**64
    expect(ok, "a seed of 64 bits", seed)
    expect(not model.training, "a model in eval mode (model.eval())", "one in training mode")
    rows = _checked_prompts(prompts, model.config.vocab_size)
    _checked_chunk(chunk_size, 1)
    device = model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    ends = torch.tensor(_end_ids(model, eos_token_id), dtype=torch.int64, device=device)
    return _tokens(model, rows, max_new_tokens, choose, ends, chunk_size, use_cuda_graph)


def generate(
    model: HybridLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    use_cuda_graph: bool = True,
) -> list[list[int]]:
    """New ids of each prompt, without the prompt, up to and with the id that ended the row.

    Args:
        model: in eval mode, on any device.
        prompts: lists of ids, of any lengths; see `unpadded` for a padded batch.
        max_new_tokens: at which the rows end that did not before.
        temperature, top_k, top_p: as in `sample`; the default is greedy, where each row gets the
            tokens that it gets alone.
        seed: of the draws; None takes torch's own generator.
        eos_token_id: id or ids that end a row; None takes the config's, () none.
        chunk_size: tokens in one pass of the prefill (a row, or of unequal prompts together), None
            for all.
        use_cuda_graph: replay decoding steps from a CUDA graph, where the device and the model
            allow it.

    Raises:
        ValueError: before any work, for an empty prompt, ids outside the vocabulary, arguments out
            of range, or a model in training mode.
    """
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
        chunk_size=chunk_size,
        use_cuda_graph=use_cuda_graph,
    )
    rows = torch.stack(list(steps), dim=1).tolist()  # [B, T]
    ends = set(_end_ids(model, eos_token_id))
    lengths = [next((n for n, i in enumerate(row, 1) if i in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Prompts of a left-padded batch `[B, T]`, as `generate` takes them.

    Raises:
        ValueError: for a mask of another shape, or padding after a token.
    """
    mask = left_padding(attention_mask, input_ids)
    if mask is None:
        return input_ids.tolist()
    return [row[there].tolist() for row, there in zip(input_ids.cpu(), mask, strict=True)]


def _tokens(
    model: HybridLM,
    prompts: list[Tensor],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    ends: Tensor,
    chunk_size: int | None,
    use_cuda_graph: bool,
) -> Iterator[Tensor]:
    """The loop of `stream`: choose, hand out, step, until all rows have ended."""
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    graphed = use_cuda_graph and can_capture(model, cache.batch)
    step = GraphedStep(model, cache) if graphed else partial(decode_step, model, cache)
    tokens = choose(_prefill_prompts(model, cache, prompts, chunk_size))
    yield tokens
    ended = torch.isin(tokens, ends)
    for _ in range(max_new_tokens - 1):
        # Where nothing can end a row, the device is not waited for.
        if ends.numel() and bool(ended.all()):
            return
        tokens = torch.where(ended, tokens, choose(step(tokens)))
        yield tokens
        ended |= torch.isin(tokens, ends)


def _prefill_prompts(
    model: HybridLM, cache: ModelCache, prompts: list[Tensor], chunk_size: int | None
) -> Tensor:
    """Logits `[B, V]` behind each prompt: as rows where they are of equal length, else packed."""
    device = model.lm_head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) == 1:
        return prefill(model, cache, torch.stack(prompts).to(device), chunk_size=chunk_size)
    bounds = torch.tensor([0, *accumulate(lengths)])
    packed = torch.cat(prompts)[None].to(device)  # [1, T]
    return prefill_packed(model, cache, packed, bounds, chunk_size=chunk_size)


def _checked_prompts(prompts: Prompts, vocab_size: int) -> list[Tensor]:
    """Prompts as vectors of int64 on the CPU."""
    expect(len(prompts) > 0, "at least one prompt", 0)
    _check_none_empty([len(prompt) for prompt in prompts])
    rows = [torch.as_tensor(prompt).cpu() for prompt in prompts]
    for row in rows:
        check_ids(row[None], vocab_size)
    return [row.long() for row in rows]


def _check_none_empty(counts: Sequence[int]) -> None:
    empty = [row for row, count in enumerate(counts) if count == 0]
    expect(not empty, "at least one token in each prompt", f"none in prompt {empty[:4]}")


def _checked_chunk(chunk_size: int | None, num_tokens: int) -> int:
    expect(chunk_size is None or chunk_size >= 1, "chunk_size of at least 1", chunk_size)
    return num_tokens if chunk_size is None else chunk_size


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _end_ids(model: HybridLM, given: int | Sequence[int] | None) -> list[int]:
    """Ids that end a row: those given, else the config's."""
    ends = model.config.eos_token_id if given is None else given
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
