import pytest
import torch

from attnlab import decay_horizon, minimax_log_decay


def test_slopes_of_minimax_01_are_the_published_ones():
    slopes = -minimax_log_decay(64, 0, 80)
    assert slopes[0] == pytest.approx(0.917 * (1 + 1e-5), rel=1e-3)
    assert slopes[-1] == pytest.approx(2**-8, rel=2e-5)
    late = -minimax_log_decay(64, 78, 80)
    assert 1 / late[-1].item() == pytest.approx(20_208, rel=1e-3)


def test_between_powers_of_two_the_doubled_slopes_fill_in():
    six = -minimax_log_decay(6, 0, 80) / (1 + 1e-5)
    four, eight = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], [2.0**-1, 2.0**-3]
    torch.testing.assert_close(six, torch.tensor(four + eight))


def test_a_single_layer_decays_with_the_whole_slope():
    assert minimax_log_decay(1, 0, 1).item() == pytest.approx(-(2**-8) * (1 + 1e-5))


def test_the_horizon_is_where_a_write_falls_below_rounding():
    g = torch.tensor([-0.5, 0.0])
    horizon = decay_horizon(g)
    assert horizon[0] == pytest.approx(16.64 / 0.5, rel=1e-3)
    assert horizon[1] == torch.inf


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, 1), "num_heads >= 1, got 0"),
        ((4, 5, 5), "num_layers = 5, got layer = 5"),
        ((4, -1, 5), "got layer = -1"),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        minimax_log_decay(*arguments)
