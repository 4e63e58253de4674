import pytest

from attnlab import cli


def test_backends_are_listed_with_the_reason_where_one_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["lightning_attention", "torch", "ok"] for line in lines)
    flash = next(
        line for line in lines if line.startswith("softmax_attention ") and "flash" in line
    )
    assert "no: needs a CUDA device, got cpu" in flash


def test_an_unknown_command_ends_with_code_2():
    with pytest.raises(SystemExit) as end:
        cli.main(["backend"])
    assert end.value.code == 2
