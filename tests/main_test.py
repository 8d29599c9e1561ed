"""The command line, as a person uses it: in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = "--config=configs/tiny_cpu.py"
SMALL_MODEL = [
    "--config.model.num_layers=1",
    "--config.model.model_dim=16",
    "--config.model.mlp_dim=16",
    "--config.model.head_dim=4",
    "--config.data.seq_len=64",
    "--config.data.batch_size=4",
    "--config.data.validation_fraction=0.003",
    "--config.optimizer.warmup_steps=2",
    "--config.sample.length=5",
]


def _command(*arguments, command=("-m", "nsa_jax.main")):
    return {
        "args": [sys.executable, *command, *map(str, arguments)],
        "cwd": ROOT,
        "env": os.environ | {"JAX_PLATFORMS": "cpu"},
        "text": True,
    }


def _run(*arguments, **keywords):
    return subprocess.run(**_command(*arguments, **keywords), capture_output=True, check=False)


def test_from_the_standard_library_to_a_trained_model(tmp_path):
    done = _run(TINY, f"--workdir={tmp_path / 'run'}", "--config.steps=4", *SMALL_MODEL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing that libraries have to say
    assert "the standard library of Python" in done.stdout
    assert "an interpolated 3-gram model has" in done.stdout
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["step"] == 4
    assert f"validation: {result['validation']['bits_per_byte']:.3f} bits" in done.stdout
    assert (tmp_path / "run" / "selection.png").is_file()

    other = _run(TINY, f"--workdir={tmp_path / 'run'}", "--config.steps=5", *SMALL_MODEL)
    assert other.returncode == 1
    assert "steps: was 4, is 5" in other.stderr
    assert "Traceback" not in other.stderr


def test_sigterm_ends_with_143_and_the_same_command_goes_on(tmp_path):
    arguments = (
        TINY,
        f"--workdir={tmp_path}",
        "--config.model.attention=dense",
        "--config.steps=100000",
        "--config.log_every=1",
        "--config.data.name=copy",
        "--config.data.task_validation_rows=4",
        *SMALL_MODEL,
    )
    for begin in ("step 1/", "going on from the checkpoint of step "):
        process = subprocess.Popen(
            **_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        line = ""
        while not line.startswith(begin):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        while not line.startswith("step"):
            line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        assert process.returncode == 143
        assert said.startswith("nsa-train: SIGTERM: stopped after step ")


def test_dry_run_needs_no_workdir():
    done = _run(TINY, "--dry_run", "--config.model.attention=dense", *SMALL_MODEL)
    assert done.returncode == 0, done.stderr
    for part in ("parameters: ", "keys a query", "temporaries"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--config is missing"),
        ((TINY,), "--workdir is missing"),
        ((TINY, "--workdir="), "--workdir is missing"),
        (("--config=configs/", "--dry_run"), "--config=configs/: it is a folder"),
        ((TINY, "--workdri=x"), "Did you mean: workdir"),
        ((TINY, "--dry_run", "word"), "what is 'word'?"),
        (("--config=absent.py", "--dry_run"), "--config=absent.py: there is no such file"),
        (
            (TINY, "--dry_run", "--config.stepz=5", "--config.learning_rate=1"),
            "--config.stepz: there is no such key; the nearest is --config.steps\n"
            "--config.learning_rate: there is no such key; the nearest is "
            "--config.optimizer.learning_rate",
        ),
        (
            (TINY, "--dry_run", "--config.optimizer.learning_rat=1"),
            "the nearest is --config.optimizer.learning_rate",
        ),
        ((TINY, "--dry_run", "--config.steps=many"), "--config.steps=many: invalid literal"),
        ((TINY, "--dry_run", "--config.steps.x=1"), "--config.steps.x: there is no such key"),
        (
            (TINY, "--dry_run", "--config.nsa.compress_stride=3"),
            "nsa: compress_stride=3 must divide compress_block_size=8",
        ),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_sentence(arguments, expected):
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("nsa-train: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("config.stepz = 3", "stepz: there is no such key; the nearest is steps"),
        ("config.modell.num_layers = 3", "line 4: AttributeError"),
        ("config.steps = 'many'", "line 4: TypeError"),
        ("return None", "must return an ml_collections.ConfigDict"),
        ("config.steps = = 3", "line 4: SyntaxError"),
        ("import absent_module", "line 4: ModuleNotFoundError: No module named 'absent_module'"),
    ],
)
def test_mistakes_in_a_config_file_name_the_file(tmp_path, body, expected):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        f"    {body}\n"
        "    return config\n"
    )
    done = _run(f"--config={path}", "--dry_run")
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_number_of_processes_that_is_none_is_a_sentence(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    done = _run(TINY, "--dry_run")
    assert done.returncode == 2
    assert done.stderr == (
        "nsa-train: JAX_NUM_PROCESSES='two' in the environment must be an integer\n"
    )


def test_ctrl_c_before_the_run_has_started_ends_with_130(tmp_path):
    (tmp_path / "interrupting.py").write_text(
        "import os, signal\n"
        "from configs import tiny_cpu\n"
        "def get_config():\n"
        # As from a terminal: what a shell runs in the background ignores the signal from the start.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return tiny_cpu.get_config()\n"
    )
    done = _run(f"--config={tmp_path / 'interrupting.py'}", "--dry_run")
    assert (done.returncode, done.stderr) == (130, "nsa-train: interrupted\n")


def test_a_terminal_that_cannot_show_a_character_gets_an_escape(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = _run(f"--config={tmp_path}/\N{LATIN SMALL LETTER E WITH ACUTE}.py", "--dry_run")
    assert done.returncode == 2
    assert r"\xe9.py: there is no such file" in done.stderr


def test_an_implementation_that_cannot_run_here_is_refused_with_its_reason():
    done = _run(TINY, "--dry_run", "--config.implementation=triton")
    assert done.returncode == 1
    assert done.stderr.startswith("nsa-train: implementation='triton': ")
    assert "Traceback" not in done.stderr


def test_the_console_script_finds_configs_and_help_as_the_module_does(tmp_path):
    script = tmp_path / "bin" / "nsa-train"
    script.parent.mkdir()
    script.write_text("from nsa_jax.main import run\nrun()\n")
    packages = tmp_path / "packages"  # as if installed: the packages, and not the folder of configs
    packages.mkdir()
    for name in ("nsa_jax", "pallas_kernels"):
        (packages / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(packages), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, script, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    mistaken = run(TINY, "--dry_run", "--config.stepz=1")
    assert mistaken.stderr.endswith("the nearest is --config.steps\n")
    shown = run("--help").stdout
    assert "--config:" in shown
    assert "--workdir:" in shown
    assert "Exit status" in shown
