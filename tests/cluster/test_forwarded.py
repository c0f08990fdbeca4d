"""The variables that travel, and that any value arrives as it was."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.cluster.environment import forwarded
from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule, Spec, remote_command, with_spec
from lumina.config import UserError

# Whatever an environment can hold: any bytes but NUL, as Python shows them.
values = st.binary(max_size=60).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))
awkward = st.sampled_from(["", "\n", "a\n\nb\n", "x,y", "it's", '"', "'\"$(rm -rf ~)`", "%h %n", "{spec}", "ü", " -x"])
names = st.from_regex(r"[A-Z][A-Z0-9_]{0,10}", fullmatch=True)


def spec(environment: dict[str, str]) -> Spec:
    return Spec("10.0.0.1:29400", "a job", "n1", 4, ["python", "-c", "print('%s,')"], environment, "/home/a b")


@settings(deadline=None)  # the machine may be busy
@given(st.dictionaries(names, values | awkward, max_size=6))
def test_any_value_arrives_unchanged(environment: dict[str, str]) -> None:
    sent = spec(forwarded([f"{name}={value}" for name, value in environment.items()], {}))
    assert sent.environment == environment
    line = sent.dump()
    assert "\n" not in line, "the agent reads one line"
    assert Spec.load(line + "\n") == sent
    assert Spec.load(base64.b64encode(line.encode()).decode()) == sent


@settings(deadline=None)  # the machine may be busy
@given(st.dictionaries(names, values | awkward, max_size=6))
def test_no_value_meets_a_shell(environment: dict[str, str]) -> None:
    """On standard input, or in pdsh's command as base64, which has no character that a shell or pdsh knows."""
    sent = spec(environment)
    for kind in ("ssh", "srun", "local"):
        command = remote_command(kind, Host("n1", 4), RemoteModule("m", "/tmp"))
        assert with_spec(command, sent) == (command, sent.dump() + "\n")
    command, text = with_spec(remote_command("pdsh", Host("n1", 4), RemoteModule("m", "/tmp")), sent)
    given_ = command[-1].rpartition(" ")[2]
    assert text == ""
    assert Spec.load(given_) == sent
    assert set(given_) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def test_what_travels() -> None:
    here = {
        "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret", "OMP_NUM_THREADS": "4", "PATH": "/bin", "HOME": "/home/a",
        "SSH_AUTH_SOCK": "/tmp/s", "MY_TOKEN": "t", "RANK": "0",
    }  # fmt: skip
    assert set(forwarded([], here)) == {"NCCL_DEBUG", "WANDB_API_KEY", "OMP_NUM_THREADS", "PATH"}
    sent = forwarded(["MY_TOKEN", "MODE=a=b", "NCCL_DEBUG=WARN", "EMPTY="], here)
    assert sent["MY_TOKEN"] == "t"
    assert sent["MODE"] == "a=b"
    assert sent["NCCL_DEBUG"] == "WARN", "what is asked for wins"
    assert sent["EMPTY"] == ""


@pytest.mark.parametrize(
    ("name", "travels"),
    [
        ("PYTORCH_ALLOC_CONF", True),
        ("PYTORCH_CUDA_ALLOC_CONF", True),
        ("CUDA_DEVICE_ORDER", True),
        ("CUBLAS_WORKSPACE_CONFIG", True),
        ("TORCHINDUCTOR_CACHE_DIR", True),
        ("TRITON_CACHE_DIR", True),
        ("OMP_PROC_BIND", True),
        ("MKL_NUM_THREADS", True),
        ("WANDB_RUN_ID", True),
        ("HF_HOME", True),
        ("https_proxy", True),
        # A rank's own place, which the launch gives it, or the shell's.
        ("TORCHELASTIC_RUN_ID", False),
        ("OMPI_COMM_WORLD_RANK", False),
        ("SLURM_PROCID", False),
        ("PYTHONHOME", False),
        ("TMPDIR", False),
    ],
)
def test_whether_a_variable_travels(name: str, travels: bool) -> None:
    assert (name in forwarded([], {name: "x"})) == travels


def test_what_names_this_machines_gpus_stays_here() -> None:
    for here, travels in (
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-12,GPU-34"}, False),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_JOB_ID": "7"}, False),
    ):
        assert ("CUDA_VISIBLE_DEVICES" in forwarded([], here)) == travels
        assert forwarded(["CUDA_VISIBLE_DEVICES"], here)["CUDA_VISIBLE_DEVICES"] == here["CUDA_VISIBLE_DEVICES"]


def test_an_export_that_is_not_set_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="MISSING: there is no such variable"):
        forwarded(["MISSING"], {})
