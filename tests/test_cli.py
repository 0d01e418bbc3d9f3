"""The command line."""

import pytest
import torch
import typer
from typer.testing import CliRunner

import forked
from koi import Koi
from koi.lab.cli.commands import app
from koi.lab.cli.sine import _adapted
from koi.models import sine_mlp
from koi.problems import Sines
from own_folder_toys import exit_code


def test_sine_prints_its_table_and_draws_its_picture(tmp_path):
    """In a process of its own, as a user types it."""
    script = tmp_path / "script.py"
    script.write_text("import runpy\nrunpy.run_module('koi', run_name='__main__')\n")
    arguments = ["sine", "--iterations", "3", "--tasks", "4"]
    done = forked.run_script(script, *arguments, cwd=tmp_path, output=tmp_path, variables={})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    steps = [line.split("│")[1].strip() for line in done.stdout.splitlines() if "±" in line]
    assert steps == ["0", "1", "2", "4", "8", "16", "32"]
    assert (tmp_path / "sine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sine", "--iterations", "-3"], "--iterations"),
        (["sine", "--out", "nowhere/sine.png"], "nowhere"),
        (["sinus"], "sinus"),
        (["train", "omniglot-5way", "--test-tasks", "1"], "one task has no interval"),
        (["evaluate", ".", "--tasks", "1"], "greater than or equal to 2"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    stderr = capsys.readouterr().err
    assert said in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_wave_that_is_drawn_runs_from_left_to_right():
    """The tasks themselves have their points in random order."""
    task = Sines(num_points=10).sample()
    model = sine_mlp()
    wave = _adapted(Koi(model, 0.02, 5), task)
    assert torch.equal(wave.inputs, torch.linspace(-5, 5, 50).unsqueeze(1))
    points = zip(task.query_inputs.flatten().tolist(), task.query_targets, strict=True)
    assert torch.equal(wave.truth, torch.stack([y for _, y in sorted(points, key=lambda p: p[0])]))
    torch.testing.assert_close(wave.predictions[0], model(wave.inputs))


@pytest.mark.parametrize(
    "command", [[], *([name] for name in typer.main.get_command(app).commands)]
)
def test_help_names_no_type_beside_a_flag(command):
    shown = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert "--help" in shown.output
    assert "bool" not in shown.output.lower()
