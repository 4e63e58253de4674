"""The figure and the table of trained models, from the logs of runs as `attnlab train` leaves them."""

import json

import pytest

from bench.training_figure import main, make_figure, read_runs, table


def write_run(folder, size, variant, losses):
    """A run of 10 steps a loss, whose documents have 8192 positions."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"train": {"size": size, "variant": variant}}))
    lines = []
    for number, loss in enumerate(losses):
        octaves = [
            {"start": 2**i, "targets": 2000, "bits_per_byte": loss - i / 100} for i in range(13)
        ]
        octaves.append({"start": 8192, "targets": 3, "bits_per_byte": 99.0})
        step = 10 * number
        if step:
            speed = {"tokens": step * 4096, "tokens_per_s": 1e5 * number}
            lines.append({"event": "step", "step": step, **speed})
        validation = {"bits_per_byte": loss, "by_position": octaves}
        lines.append({"event": "validation", "step": step, **validation})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_has_the_last_validation_of_each_run(tmp_path):
    write_run(tmp_path / "a", "15m", "softmax", [8.0, 2.0, 1.5])
    write_run(tmp_path / "b", "3m", "hybrid", [8.0, 2.5, 2.0])
    lines = table(read_runs(tmp_path)).splitlines()
    assert lines[2] == "| hybrid 3m | 200 k | 81.9 k | 2.000 | 1.940 | 1.880 |"
    assert lines[3].startswith("| softmax 15m |")
    assert main([str(tmp_path)]) == 0 and (tmp_path / "validation.png").stat().st_size > 10_000


def test_the_figure_leaves_out_the_start_and_octaves_of_a_few_targets(tmp_path):
    write_run(tmp_path / "a", "15m", "hybrid", [8.0, 2.0, 1.5])
    over_time, by_position = make_figure(read_runs(tmp_path)).axes
    assert over_time.lines[0].get_xydata().tolist() == [[40960, 2.0], [81920, 1.5]]
    assert by_position.lines[0].get_ydata().max() == 1.5


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "got none in" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        read_runs(tmp_path)
