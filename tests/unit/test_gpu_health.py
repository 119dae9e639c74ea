"""What is made of the kernel's messages and of nvidia-smi's documents, of several drivers. Those of failing GPUs are composed: see the recordings' README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.llm.plugins.module_utils import gpu_health
from ansible_collections.gpufleet.llm.plugins.module_utils.gpu_health import Finding, Gpu, Look, Messages
from hypothesis import given
from hypothesis import strategies as st

RECORDINGS = Path(__file__).parent / "recordings"
KERNEL = (RECORDINGS / "gpu_health/kernel.jsonl").read_text().splitlines()
ADDRESSES = [f"0000:{bus}:00.0" for bus in ("17", "3d", "60", "70", "98", "bd", "dd", "ed")]
EIGHT = [Gpu(number, address, f"GPU-{number}") for number, address in enumerate(ADDRESSES)]
# Instances by the GPUs that they use.
USES: dict[str, list[Any]] = {"one": [0], "two": [1, 2], "four": [3, 4, 5], "by-uuid": ["GPU-6"]}


def document(name: str) -> str:
    return (RECORDINGS / name).read_text()


def look(name: str, time: float = 10000.0) -> Look:
    return gpu_health.look(0 if name.endswith("xml") else 15, document(name), time)


def heard(lines: list[str] = KERNEL) -> Messages:
    messages = Messages()
    for line in lines:
        messages.read(line)
    return messages


def kernel(time: float, text: str) -> str:
    return json.dumps({"__CURSOR": f"c{time}", "__MONOTONIC_TIMESTAMP": str(int(time * 1e6)), "MESSAGE": text})


def of_messages(now: float, *, seen: Look | None = None, lines: list[str] = KERNEL) -> dict[str, Finding]:
    """The findings of eight GPUs of which nvidia-smi says what `seen` has, or nothing in time."""
    seen = seen or Look(problem="nvidia-smi does not answer", time=now)
    return {one.key: one for one in gpu_health.findings(EIGHT, seen, heard(lines), USES, now, {})}


def of_look(name: str, hot: int = 0, time: float = 10000.0) -> dict[str, Finding]:
    seen = look(name, time)
    gpus = gpu_health.known([], [], seen)
    hotness = dict.fromkeys(seen.gpus, hot)
    return {one.key: one for one in gpu_health.findings(gpus, seen, Messages(), {}, time, hotness)}


# --- the kernel


def test_messages_of_gpus_are_found_among_all_others() -> None:
    messages = heard()
    assert [(xid.address, xid.number) for xid in messages.xids] == [
        ("0000:17:00.0", 13), ("0000:17:00.0", 43), ("0000:3d:00.0", 31), ("0000:60:00.0", 63), ("0000:60:00.0", 94),
        ("0000:70:00.0", 95), ("0000:70:00.0", 154), ("0000:98:00.0", 79), ("0000:bd:00.0", 119), ("0000:bd:00.0", 45),
        ("0000:dd:00.0", 48), ("0000:dd:00.0", 74), ("0000:dd:00.0", 999), ("0000:ed:00.0", 62),
    ]  # fmt: skip
    assert messages.xids[7].time == 500.0
    assert messages.counts["0000:98:00.0", 79] == 1
    assert messages.cursor.startswith("s=5d1e;i=13;")
    assert [text for _time, text in messages.switches] == ["SXid 20034 of 0000:05:00.0"]


@pytest.mark.parametrize(
    ("key", "level", "action", "out", "words"),
    [
        ("xid 13 0000:17:00.0", "warn", "restart_app", False, "XID 13"),
        ("xid 31 0000:3d:00.0", "warn", "restart_app", False, "application"),
        ("xid 94 0000:60:00.0", "warn", "restart_app", False, "contained"),
        ("xid 95 0000:70:00.0", "critical", "reset_gpu", True, "not contained"),
        ("recovery 0000:70:00.0", "critical", "reset_gpu", True, "GPU Reset Required"),
        ("xid 79 0000:98:00.0", "critical", "reboot", True, "fallen off the bus"),
        ("xid 119 0000:bd:00.0", "critical", "reset_gpu", True, "GSP"),
        ("xid 48 0000:dd:00.0", "warn", "inspect", False, "double bit"),
        ("xid 74 0000:dd:00.0", "warn", "inspect", False, "NVLink"),
        ("xid 999 0000:dd:00.0", "warn", "inspect", False, "not in the table"),
        ("xid 62 0000:ed:00.0", "critical", "reset_gpu", True, "XID 62"),
        ("nvswitch", "critical", "reset_gpu", False, "SXid 20034"),
    ],
)
def test_what_a_message_asks_for(key: str, level: str, action: str, out: bool, words: str) -> None:
    found = of_messages(800.0)[key]
    assert (found.level, found.action, found.out) == (level, action, out)
    assert words in found.what


def test_messages_that_are_no_reason_for_anything_are_left_alone() -> None:
    found = of_messages(800.0)
    assert not [key for key in found if key.startswith(("xid 43", "xid 63", "xid 45", "xid 154"))]


def test_a_finding_names_its_instances_and_what_to_do() -> None:
    found = of_messages(800.0)
    assert found["xid 95 0000:70:00.0"].instances == ("four",)
    assert "nvidia-smi --gpu-reset --id 3" in found["xid 95 0000:70:00.0"].advice
    assert "playbooks/reboot.yml" in found["xid 79 0000:98:00.0"].advice
    assert found["xid 74 0000:dd:00.0"].instances == ("by-uuid",)
    assert found["xid 62 0000:ed:00.0"].instances == ()
    for one in found.values():
        assert one.action == "nothing" or one.advice


def test_an_application_s_fault_is_forgotten_unless_it_comes_again() -> None:
    assert "xid 13 0000:17:00.0" not in of_messages(100.0 + gpu_health.TOLD_SECONDS + 1)
    lines = [kernel(1000.0 * number, "NVRM: Xid (PCI:0000:17:00): 13, pid=1, name=a") for number in range(1, 4)]
    assert of_messages(20000.0, lines=lines)["xid 13 0000:17:00.0"].action == "inspect"
    assert of_messages(3000.0, lines=lines[:2])["xid 13 0000:17:00.0"].action == "restart_app"


def test_a_driver_that_was_loaded_again_starts_anew() -> None:
    again = kernel(790.0, "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8 12:41:17 UTC 2025")
    assert set(of_messages(800.0, lines=[*KERNEL, again])) == {"smi"}


def test_what_a_person_has_dealt_with_is_forgotten() -> None:
    messages = heard()
    messages.forget(755.0)
    assert (messages.xids, messages.switches) == ([], [])
    messages = heard()
    messages.forget(499.0)
    assert messages.xids[0].number == 79


def told(address: str, **more: object) -> Look:
    """nvidia-smi of R580, of all GPUs; of one of them something else."""
    base = look("gpu_health/r580-reset.xml").gpus["0000:17:00.0"]
    gpus = {one: dict(base) for one in ADDRESSES}
    gpus[address] |= more
    return Look(gpus, frozenset(), "", 10000.0)


def test_a_driver_that_says_that_nothing_is_left_to_do_is_believed_after_a_while() -> None:
    """R570 and newer tell themselves; before that a message stands until the next boot."""
    line = [kernel(9990.0, "NVRM: Xid (PCI:0000:70:00): 95, pid=1, name=a, Uncontained")]
    fresh = of_messages(10000.0, seen=told(ADDRESSES[3]), lines=line)["xid 95 0000:70:00.0"]
    assert (fresh.level, fresh.out) == ("critical", True)
    line = [kernel(9000.0, "NVRM: Xid (PCI:0000:70:00): 95, pid=1, name=a, Uncontained")]
    later = of_messages(10000.0, seen=told(ADDRESSES[3]), lines=line)["xid 95 0000:70:00.0"]
    assert (later.level, later.action, later.out) == ("warn", "nothing", False)
    old = told(ADDRESSES[3], tells_action=False)
    assert of_messages(10000.0, seen=old, lines=line)["xid 95 0000:70:00.0"].out
    # what was decided by a message counts where nvidia-smi does not tell
    decided = [kernel(9000.0, "NVRM: Xid (PCI:0000:70:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)")]  # fmt: skip
    assert of_messages(10000.0, seen=old, lines=decided)["recovery 0000:70:00.0"].action == "reboot"
    assert of_messages(10000.0, seen=told(ADDRESSES[3]), lines=decided) == {}
    back = [kernel(9001.0, "NVRM: Xid (PCI:0000:70:00): 154, GPU recovery action changed from 0x2 (Node Reboot Required) to 0x0 (None)")]  # fmt: skip
    assert of_messages(10000.0, seen=old, lines=decided + back) == {}


@given(st.text(max_size=300))
def test_no_line_of_a_journal_breaks_it(text: str) -> None:
    messages = Messages()
    messages.read(text)
    messages.read(json.dumps({"MESSAGE": text, "__CURSOR": "c", "__MONOTONIC_TIMESTAMP": "1"}))
    messages.read(json.dumps({"MESSAGE": None, "__CURSOR": 3, "__MONOTONIC_TIMESTAMP": text}))
    gpu_health.look(0, text, 1.0)
    gpu_health.look(0, f'<?xml version="1.0" ?>{text}', 1.0)
    assert messages.switches == [] or "SXid" in text


def test_a_storm_of_messages_is_counted_and_not_kept() -> None:
    lines = [kernel(float(number), "NVRM: Xid (PCI:0000:17:00): 13, pid=1, name=a") for number in range(1000)]
    messages = heard(lines)
    assert len(messages.xids) == messages.most
    assert messages.counts == {("0000:17:00.0", 13): 1000}


# --- nvidia-smi


def test_a_gpu_that_asks_to_be_reset_and_others_that_can_wait() -> None:
    found = of_look("gpu_health/r580-reset.xml")
    shown = {key: (one.level, one.action, one.out) for key, one in found.items()}
    assert shown == {
        "recovery 0000:3d:00.0": ("critical", "reset_gpu", True),
        "ecc 0000:3d:00.0": ("warn", "inspect", False),
        "rows 0000:60:00.0": ("warn", "reset_gpu", False),
        "recovery 0000:70:00.0": ("warn", "reset_gpu", False),
    }
    assert found["recovery 0000:3d:00.0"].gpu == Gpu(1, "0000:3d:00.0", "GPU-00000000-0000-0000-0000-000000000001")


def test_what_is_to_be_sent_back() -> None:
    shown = {key: (one.level, one.action, one.out) for key, one in of_look("gpu_health/r580-rma.xml").items()}
    assert shown == {
        "rows 0000:17:00.0": ("critical", "inspect", True),
        "sram 0000:3d:00.0": ("critical", "inspect", True),
        "recovery 0000:60:00.0": ("critical", "reboot", True),
    }


def test_a_hot_gpu_is_told_when_it_lasts_and_stays_in_use() -> None:
    assert of_look("gpu_health/r525-hot.xml", hot=1) == {}
    found = of_look("gpu_health/r525-hot.xml", hot=2)
    assert {key: one.level for key, one in found.items()} == {
        "hw_slowdown 0000:17:00.0": "critical",
        "hw_thermal_slowdown 0000:17:00.0": "critical",
        "sw_thermal_slowdown 0000:3d:00.0": "warn",
    }
    assert "(at 91 C)" in found["hw_slowdown 0000:17:00.0"].what
    assert not any(one.out for one in found.values())


@pytest.mark.parametrize("name", ["gpu_health/lost.txt", "gpu_health/lost-listed.xml"])
def test_a_gpu_that_nvidia_smi_does_not_reach(name: str) -> None:
    seen = look(name)
    gpus = gpu_health.known([Gpu(0, "0000:17:00.0", "GPU-a"), Gpu(1, "0000:3d:00.0", "GPU-b")], [], seen)
    found = {one.key: one for one in gpu_health.findings(gpus, seen, Messages(), {"chat": [1], "embed": [0]}, 1e4, {})}
    lost = found["lost 0000:3d:00.0"]
    assert (lost.level, lost.action, lost.out, lost.instances) == ("critical", "reboot", True, ("chat",))
    assert lost.gpu == Gpu(1, "0000:3d:00.0", "GPU-b")
    assert "lost 0000:17:00.0" not in found, "of the others nothing is known"


def test_a_gpu_that_is_only_on_the_bus_any_more_keeps_the_numbers_of_the_others() -> None:
    """Recorded by the role nvidia_driver's tests: nvidia-smi lists seven of eight, another one asks to be reset."""
    seen = look("nvidia/lost-gpu/nvidia-smi.xml")
    listed = [line.split()[0] for line in document("nvidia/lost-gpu/host.txt").splitlines() if " 0x030200 " in line]
    gpus = gpu_health.known([], listed, seen)
    found = gpu_health.findings(gpus, seen, Messages(), {"all": list(range(8))}, 1e4, {})
    (gone,) = set(listed) - set(seen.gpus)
    lost = [one.gpu for one in found if one.key.startswith("lost")]
    assert lost == [Gpu(sorted(listed).index(gone), gone)]
    assert [one.action for one in found if one.key.startswith("recovery")] == ["reset_gpu"]
    # and so it is when the kernel has given it up as well
    again = gpu_health.known(gpus, [], seen)
    assert again == gpus


def test_a_gpu_that_is_gone_has_nothing_else_to_say() -> None:
    seen = Look({}, frozenset({"0000:98:00.0"}), "", 1e4)
    found = gpu_health.findings([EIGHT[4]], seen, heard(), USES, 800.0, {})
    assert [one.key for one in found] == ["lost 0000:98:00.0", "nvswitch"]


@pytest.mark.parametrize(
    ("status", "output", "level", "action"),
    [
        (None, "", "critical", "inspect"),
        (1, document("gpu_health/mismatch.txt"), "critical", "reboot"),
        (6, document("gpu_health/none.txt"), "warn", "inspect"),
        (127, "nvidia-smi cannot be run: No such file or directory", "warn", "inspect"),
        (0, '<?xml version="1.0" ?><nvidia_smi_log><gpu', "warn", "inspect"),
    ],
)
def test_when_nvidia_smi_says_nothing_no_gpu_is_taken_for_lost(
    status: int | None, output: str, level: str, action: str
) -> None:
    seen = gpu_health.look(status, output, 1e4)
    (found,) = gpu_health.findings(EIGHT, seen, Messages(), USES, 1e4, {})
    assert (found.key, found.level, found.action, found.out) == ("smi", level, action, False)


@pytest.mark.parametrize("machine", ["h200-container", "h100x8", "t4", "v100", "consumer", "cloud-image", "mig", "dgx"])
def test_a_gpu_that_is_well_has_no_findings(machine: str) -> None:
    """As other tests' machines show them, one of them recorded."""
    assert of_look(f"nvidia/{machine}/nvidia-smi.xml", hot=5) == {}
    assert look(f"nvidia/{machine}/nvidia-smi.xml").gpus


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("", ("ok", "nothing")), ("None", ("ok", "nothing")), ("Reset", ("critical", "reset_gpu")),
        ("GPU Reset", ("critical", "reset_gpu")), ("Reboot", ("critical", "reboot")), ("Node Reboot", ("critical", "reboot")),
        ("System Reboot", ("critical", "reboot")), ("Bus Reset", ("critical", "reset_gpu")), ("Drain P2P", ("warn", "restart_app")),
        ("Drain and Reset", ("warn", "reset_gpu")), ("something new", ("warn", "inspect")),
    ],
)  # fmt: skip
def test_the_words_of_the_driver(said: str, wanted: tuple[str, str]) -> None:
    assert gpu_health.recovery(said) == wanted


def test_what_uses_a_gpu_was_hit_only_by_messages_after_its_start() -> None:
    xids = heard().xids
    hit = gpu_health.harmed(xids, EIGHT[2], 250.0)
    assert hit is not None and hit.number == 94
    assert gpu_health.harmed(xids, EIGHT[2], 350.0) is None
    assert gpu_health.harmed(xids, EIGHT[3], 0.0) is None, "that needs a reset, and a restart does not help"
