"""What changes from step to step: the learning rate, and the multiplier on linear mixers."""

import math


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, decay_share: float) -> float:
    """Factor of the peak learning rate at a step, from 1 to `steps`: warm-up, plateau, decay.

    It rises linearly over the first `warmup_steps`, and falls as 1 - sqrt(x) over the last
    `decay_share` of the steps, not quite to 0 at the last one. Source: warm-up-stable-decay of
    MiniCPM, arXiv 2404.06395, section 4; the shape of its decay, arXiv 2405.18392, section 3.
    """
    rise = min(1.0, step / max(warmup_steps, 1))
    decay_steps = round(decay_share * steps)
    into = step - (steps - decay_steps)  # steps into the decay, from 1
    fall = 1 - math.sqrt(into / (decay_steps + 1)) if into > 0 else 1.0
    return min(rise, fall)


def linear_multiplier(step: int, *, steps: int, ramp: tuple[float, float, float] | None) -> float:
    """Multiplier on linear mixers' outputs at a step, from 1 to `steps`; 1 without a ramp.

    A ramp (value, begin, end) holds `value` until the share `begin` of the steps and reaches 1 at
    the share `end`, so that softmax layers can learn before linear ones have solved the task.
    """
    if ramp is None:
        return 1.0
    value, begin, end = ramp
    x = (step / steps - begin) / max(end - begin, 1e-9)
    return value + (1 - value) * min(max(x, 0.0), 1.0)
