"""`posttrain doctor`: each thing that can be wrong is found, with a remedy; and nothing else is called broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
from distributions import install
from needed import first_party
from posttrain import catalogue, cli, doctor
from posttrain.doctor import Finding
from posttrain.hookspecs import ENTRY_POINT_GROUP, Component, hookimpl
from posttrain.registry import discover, import_file

SAME = {name: "0.1.0" for name in doctor.PACKAGES}


def installed(versions: Mapping[str, str]) -> doctor.Installed:
    return versions.get


class APlugin:
    """A plugin as an object with hooks."""

    def __init__(self, *declared: Component) -> None:
        self.declared = declared

    @hookimpl
    def components(self) -> tuple[Component, ...]:
        return self.declared


class Another(APlugin):
    """A second one."""


def only(findings: list[Finding], status: str) -> list[Finding]:
    return [f for f in findings if f.status == status]


@first_party
def test_this_environment_is_sound_and_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = {(f["section"], f["name"]): f["value"] for f in said["findings"]}
    assert said["broken"] is False
    assert names["packages", "posttrain-core"] == metadata.version("posttrain-core")
    assert names["optional libraries", "torch"].startswith(metadata.version("torch"))
    assert names["devices", "torch"].startswith(metadata.version("torch"))
    assert {"python", "packages", "optional libraries", "machine", "devices", "plugins"} <= {s for s, _ in names}


def test_text_has_a_line_for_each_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda registry: [
        Finding("a", "one", "1"), Finding("a", "two", "2", "note", "look"),
        Finding("b", "three", "3", "broken", "mend")])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == "a\n  one  1\n  two  NOTE  2  -> look\nb\n  three  BROKEN  3  -> mend\n"


def test_a_package_of_another_version_is_named() -> None:
    found = list(doctor.packages(installed({**SAME, "posttrain-backends": "0.2.0"})))
    (broken,) = only(found, "broken")
    assert broken.name == "posttrain-backends" and "0.2.0, but posttrain-core is 0.1.0" in broken.value
    assert broken.remedy.endswith("'posttrain-backends==0.1.0'")
    assert not only(list(doctor.packages(installed(SAME))), "broken")


def test_packages_that_are_not_installed_are_no_fault() -> None:
    found = list(doctor.packages(installed({"posttrain-core": "0.1.0"})))
    assert {f.status for f in found} == {"ok"} and sum(f.value == "not installed" for f in found) == 5


def test_a_library_may_be_too_old_for_an_extra_that_is_not_there() -> None:
    offered = {"peft": [("posttrain-backends[lora]", "0.20"), ("posttrain-backends[quantized]", "0.21")],
               "torchao": [("posttrain-backends[quantized]", "0.18")]}
    alone = {finding.name: finding for finding in doctor.libraries(offered, installed({"peft": "0.20"}))}
    assert alone["peft"].status == "ok" and "not installed" in alone["torchao"].value
    there = installed({"peft": "0.20", "torchao": "0.18"})
    both = {finding.name: finding for finding in doctor.libraries(offered, there)}
    assert both["peft"].status == "broken" and "posttrain-backends[quantized] needs at least 0.21" in both["peft"].value


def test_optional_libraries_name_the_extra_and_an_old_one_is_broken() -> None:
    offered = {"torch": [("posttrain-backends[torch]", "2.11")], "matplotlib": [("posttrain-core[report]", "3.9")]}
    torch, matplotlib = doctor.libraries(offered, installed({"torch": "2.9.1+cpu"}))
    assert torch.status == "broken" and "2.9.1+cpu; posttrain-backends[torch] needs at least 2.11" in torch.value
    assert matplotlib.status == "ok" and matplotlib.remedy == "pip install 'posttrain-core[report]'"
    new = installed({"torch": "2.11.0+cu130", "matplotlib": "3.10"})
    assert not only(list(doctor.libraries(offered, new)), "broken")


@first_party
def test_extras_are_those_of_the_metadata() -> None:
    offered = doctor.extras(installed(SAME))
    assert ("posttrain-backends[torch]", "2.11") in offered["torch"]
    assert ("posttrain-core[report]", "3.9") in offered["matplotlib"] and "numpy" not in offered


def test_conflicts() -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    (found,) = doctor.conflicts(installed(both))
    assert found.status == "broken" and "overwrites" in found.value and "onnxruntime-gpu 1.31.1" in found.name
    assert not list(doctor.conflicts(installed({"onnxruntime": "1.32.0"})))
    assert list(doctor.conflicts(installed({"mlflow": "3.1", "mlflow-skinny": "3.2"})))
    assert not list(doctor.conflicts(installed({"mlflow": "3.2", "mlflow-skinny": "3.2"})))


def test_a_torch_that_does_not_import_is_broken_and_breaks_nothing(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = list(doctor.devices(installed({"torch": "2.13.0"})))
    (broken,) = only(found, "broken")
    assert "libcudart.so.13" in broken.value and "pip install" in broken.remedy


def test_a_device_that_torch_cannot_use_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an NVIDIA card and torch's CPU build; driver and torch are stand-ins that answer as those do."""
    monkeypatch.setattr("posttrain.rundir.accelerators", lambda: ["NVIDIA H200"])
    answer = {"version": "2.13.0+cpu", "built for CUDA": None, "MPS": False, "threads": 2, "devices": []}
    monkeypatch.setattr(doctor, "ask", lambda python, code: (answer, ""))
    (note,) = only(list(doctor.devices(installed({"torch": "2.13.0+cpu"}))), "note")
    assert note.value == "the driver shows a device, but torch is a build without CUDA"


@pytest.mark.parametrize(("code", "says"), [
    ("print('{}'); raise SystemExit(3)", "exit code 3"), ("print('no json')", "Expecting value"),
    ("import time; time.sleep(30)", "no answer within 0.5 s")])
def test_whatever_the_other_process_does_is_an_answer(code: str, says: str) -> None:
    found, error = doctor.ask(sys.executable, code, timeout=0.5 if "sleep" in code else 30.0)
    assert found is None and says in error


def test_plugins_broken_foreign_left_out_and_clashing() -> None:
    def point(name: str, group: str, value: str) -> metadata.EntryPoint:
        return metadata.EntryPoint(name, value, group)
    first = APlugin(Component("estimator", "mine", "json:JSONDecoder", "one"))
    second = Another(Component("estimator", "mine", "json:JSONDecoder", "two"))
    registry = discover([first, second], environ={"POSTTRAIN_BLOCK": "unwanted"}, entry_points=[
        point("old", "posttrain.v0", "a:b"), point("bad", "posttrain.v1", "no_such_module_here"),
        point("unwanted", "posttrain.v1", "a:b")])
    found = list(doctor.plugins(registry))
    (bad,) = only(found, "broken")
    assert bad.name == "bad" and bad.remedy.endswith("POSTTRAIN_BLOCK=unwanted,bad"), "the one that is there stays"
    foreign, left, clash = only(found, "note")
    assert "posttrain.v0" in foreign.value and "posttrain.v1" in foreign.remedy
    assert (left.name, left.value) == ("unwanted", "is left out by POSTTRAIN_BLOCK")
    assert clash.name == "estimator 'mine'" and "APlugin/mine or Another/mine" in clash.remedy


def test_components_that_cannot_be_used_are_found_in_a_process_of_their_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install(tmp_path, "careless", """
from posttrain.hookspecs import Component, hookimpl
print("hello")
@hookimpl
def components():
    yield Component("estimator", "lost", "no_such_module.at_all:X", "a module that is not there")
    yield Component("reward", "silent", "careless_under_test:reward", " ")
    yield Component("reward", "wrong", "careless_under_test:Reward", "a field that is not there", {"pont": 2})
    yield Component("reward", "constant", "careless_under_test:NUMBER", "nothing that can be called")
    yield Component("reward", "right", "careless_under_test:Reward", "as it should be", {"point": 2})
from dataclasses import dataclass
NUMBER = 3
@dataclass(frozen=True)
class Reward:
    point: float = 1.0
def reward(prompts, completions, **columns): return [0.0] * len(prompts)
""", requires=["posttrain-core"])
    found = {f.name: f for f in doctor.components() if "careless" in f.name}
    assert {name.partition(" (")[0]: f.status for name, f in found.items()} == {
        "estimator 'lost'": "broken", "reward 'silent'": "note", "reward 'wrong'": "broken",
        "reward 'constant'": "broken"}
    assert "No module named 'no_such_module'" in found["estimator 'lost' (careless)"].value
    assert found["reward 'wrong' (careless)"].value == \
        "its defaults name what is no field of careless_under_test:Reward: 'pont'; did you mean 'point'?"
    assert "is no class and no function, but 3" in found["reward 'constant' (careless)"].value
    assert found["reward 'silent' (careless)"].value == "has no summary"


@first_party
def test_what_is_known_and_not_installed_is_listed() -> None:
    bare = discover(environ={}, entry_points=())
    found = {f.name: f for f in doctor.not_installed(bare)}
    assert "estimator: clipped_is, dr_grpo, gae, grpo, " in found["posttrain-estimators"].value
    assert found["posttrain-estimators"].remedy == "pip install posttrain-estimators"
    assert list(doctor.not_installed(discover(environ={}))) == [], "here all are installed"


def test_it_imports_no_framework() -> None:
    code = ("import sys\nfrom posttrain.cli import main\nassert main(['doctor']) == 0\n"
            "assert not {'torch', 'jax', 'transformers', 'mlflow', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_with_core_alone_it_says_what_is_missing() -> None:
    registry = discover(environ={"POSTTRAIN_PLUGINS": "posttrain-core"})
    found = doctor.examine(registry, installed({"posttrain-core": "0.1.0"}))
    assert not doctor.is_broken(found)
    assert any(f.section == "devices" and f.value == "not installed" for f in found)


def test_with_core_alone_nothing_alarms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is optional and not there is no fault, also after plugins in files were imported."""
    (tmp_path / "p.py").write_text("from posttrain.hookspecs import Component, hookimpl\n@hookimpl\ndef components():\n"
                                   "    yield Component('reward', 'mine', 'p:mine', 'one for all')\n"
                                   "def mine(prompts, completions, **columns): return [1.0] * len(prompts)\n")
    import_file(tmp_path / "p.py")
    core, = (p for p in metadata.entry_points(group=ENTRY_POINT_GROUP) if p.value == "posttrain.plugin")
    alone = discover([tmp_path / "p.py"], environ={}, entry_points=[core])
    monkeypatch.setattr(catalogue, "_installed", lambda project: project in ("posttrain-core", "numpy"))
    without = {fault.component: fault for fault in catalogue.faults(alone)}
    assert {fault.status for fault in without.values()} == {"ok"} and "tracker 'wandb'" in without
    assert without["tracker 'wandb'"].remedy == "pip install 'posttrain-core[wandb]'"
    answer = {"number": len(alone.components()), "seconds": 0.1, "faults": [asdict(f) for f in without.values()]}
    monkeypatch.setattr(doctor, "ask", lambda python, code: (answer, ""))  # as the other process there says
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = doctor.examine(alone, installed({"posttrain-core": "0.1.0"}))
    assert [f for f in found if f.status != "ok"] == [] and len(found) > 30
