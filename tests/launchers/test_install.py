"""Which constraints the installer takes, and what it says. `make resolve` and every install resolve them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SETUP = '    "torch>=2.11,<2.14",'
STOCK = ("2.13.0", ["filelock", "cuda-toolkit[cublas]==13.0.3; platform_system == 'Linux'", "triton==3.7.1; extra"])
PLAIN = ("2.13.0+cpu", ["filelock", "sympy>=1.13.3"])


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lumina_installer", ROOT / "launchers/install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_set_follows_the_wheel(install: ModuleType) -> None:
    for gpu in (False, True):
        assert install.choose(None, STOCK, gpu, SETUP).constraints == [f"-c {ROOT / 'constraints-cuda.txt'}"]
        assert install.choose(None, PLAIN, gpu, SETUP).constraints == [f"-c {ROOT / 'constraints-cpu.txt'}"]


def test_one_line_says_which_and_why(install: ModuleType) -> None:
    said = [install.choose(None, wheel, gpu, SETUP).reason for wheel in (STOCK, PLAIN) for gpu in (False, True)]
    assert all("\n" not in line for line in said)
    assert [re.search("CUDA|CPU", line)[0] for line in said] == ["CUDA", "CUDA", "CPU", "CPU"]  # type: ignore[index]
    assert [("no GPU is here" in line) for line in said] == [True, False, True, False]
    assert "docs/install.md" in said[3]  # a GPU that this torch cannot use


def test_a_torch_that_is_there_is_kept(install: ModuleType) -> None:
    choice = install.choose(("2.11.0+cu130", "/usr/lib/python3"), None, True, SETUP)
    assert choice.constraints == [f"-c {ROOT / 'constraints.txt'}", "torch==2.11.0+cu130"]
    assert "2.11.0+cu130" in choice.reason
    assert "kept" in choice.reason


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.6.0+cu124", "2.11.0a0+a6c236b9fd.nv26.1"])
def test_one_that_was_not_tried_is_refused_not_replaced(install: ModuleType, version: str) -> None:
    with pytest.raises(ValueError, match=r"torch>=2\.11,<2\.14"):
        install.choose((version, "/somewhere"), None, True, SETUP)


def test_an_older_drivers_wheel_keeps_its_own_libraries(install: ModuleType) -> None:
    wheel = ("2.13.0+cu126", ["nvidia-cublas-cu12==12.6.4.1", "triton==3.7.1"])
    assert install.choose(None, wheel, True, SETUP).constraints == [
        f"-c {ROOT / 'constraints.txt'}",
        "torch==2.13.0+cu126",
    ]


def test_a_folder_with_a_space_is_quoted(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOT", Path("/my projects/lumina"))
    assert install.choose(None, PLAIN, True, SETUP).constraints == ["-c '/my projects/lumina/constraints-cpu.txt'"]


def test_an_environment_without_pip_gets_it(install: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "of another tool"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    install.make_venv(venv, SETUP)
    subprocess.run([venv / "bin/python", "-m", "pip", "--version"], check=True, capture_output=True)


def installed(venv: Path, name: str, requirement: str) -> Path:
    """An environment in which pip finds a package of this name and requirement."""
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    info = next((venv / "lib").glob("python*/site-packages")) / f"{name}-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2.0\nRequires-Dist: {requirement}\n"
    )
    (info / "RECORD").write_text("".join(f"{info.name}/{file},,\n" for file in ("METADATA", "RECORD")))
    return info


def test_an_earlier_lumina_is_uninstalled_under_its_former_name(
    install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = installed(tmp_path / "venv", "lumina", "deepspeed<0.20,>=0.19.8")
    install.remove_former(tmp_path / "venv/bin/python")
    assert not info.exists()
    assert "lumina 0.2.0 is now called lumina-train" in capsys.readouterr().out
    install.remove_former(tmp_path / "venv/bin/python")
    assert capsys.readouterr().out == ""


def test_another_projects_lumina_is_refused_not_removed(install: ModuleType, tmp_path: Path) -> None:
    info = installed(tmp_path / "venv", "lumina", "PyQt5")
    with pytest.raises(ValueError, match=r"another project with the same import name: \S+ -m pip uninstall lumina"):
        install.remove_former(tmp_path / "venv/bin/python")
    assert info.exists()


def test_a_card_is_seen_by_its_device_file(install: ModuleType, tmp_path: Path) -> None:
    assert not install.has_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()  # the driver's own, there without a card too
    assert not install.has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert install.has_gpu(tmp_path)


def test_setup_states_the_bounds_that_are_read(install: ModuleType) -> None:
    low, high = install.bounds((ROOT / "setup.py").read_text())
    pinned = re.search(r"^torch==([\d.]+)$", (ROOT / "constraints-cuda.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert install.within(pinned[1], low, high)


def test_the_shared_file_pins_nothing_that_hangs_on_the_build() -> None:
    shared = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^(torch|triton|setuptools|nvidia-(?!ml-py)\S*|cuda-\S*)==", shared, re.MULTILINE)
    for name in ("constraints-cpu.txt", "constraints-cuda.txt"):
        text = (ROOT / name).read_text()
        assert "-c constraints.txt\n" in text
        assert re.search(r"^torch==", text, re.MULTILINE)
        assert re.search(r"^triton==", text, re.MULTILINE)
