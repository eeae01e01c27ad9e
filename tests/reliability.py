"""What a session of pytest tried, case by case of the reliability matrix (docs/reliability.md).

A test belongs to the cases that its name starts with (`test_I8_...`, `test_M2_M3_...`) and counts as one try, each
parametrised one apart. One that tries many things records instead what it did, as often as it likes:
`record_property("reliability", {"case": "I2", "tried": 7690, "passed": 7690, "what": "files of the corpora"})`.
Tests under other names are assigned in `ALSO`.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MATRIX = {
    "D": range(1, 10),
    "I": range(1, 19),
    "M": range(1, 9),
    "T": range(1, 11),
    "R": range(1),
}
"""Letter -> numbers of the cases: determinism, inputs, model files, training faults, the rule for all files."""
CASES = tuple(f"{letter}{number}" for letter, numbers in MATRIX.items() for number in numbers)
PROPERTY = "reliability"

ALSO: dict[str, tuple[str, ...]] = {
    "D1": (
        "test_detectors.py::test_battery[*-seeds]",
        "test_detectors.py::test_battery[*-global_random]",
        "test_training.py::test_the_same_seed_trains_bit_equal_and_leaves_the_global_random_state_alone",
    ),
    "D2": ("test_detectors.py::test_battery[*-batches]",),
    "D5": (
        "test_affine.py::test_log_det_equals_that_of_autograd_and_positions_do_not_mix",
        "test_coupling.py::test_log_det_of_maps_equals_autograd",
        "test_coupling.py::test_log_det_of_fibres_equals_autograd",
        "test_coupling.py::test_log_det_with_rotations_equals_autograd",
        "test_fastflow.py::test_the_log_det_of_a_level_equals_autograd",
        "test_flow.py::test_log_det_equals_autograd",
        "test_flow.py::test_inverse_undoes_forward",
        "test_fusion.py::test_log_det_equals_autograd",
        "test_fusion.py::test_coupling_inverse_undoes_forward",
        "test_msflow.py::test_the_log_det_equals_autograds",
        "test_msflow.py::test_the_inverse_gives_the_features_back",
        "test_uflow.py::test_the_log_det_of_the_whole_u_equals_autograds",
        "test_uflow.py::test_the_inverse_of_the_whole_u_gives_the_features_back",
        "test_egmf.py::test_the_density_is_exact_through_flows_and_fusion",
    ),
    "D6": (
        "test_metrics.py::test_det_auroc_is_the_share_of_ordered_pairs",
        "test_metrics.py::test_auroc_survives_monotone_maps_and_turns_with_the_sign",
        "test_metrics.py::test_large_scores_keep_their_order",
        "test_metrics.py::test_one_class_only_is_undefined_with_a_reason",
        "test_metrics.py::test_aupro_equals_the_slow_definition",
        "test_metrics.py::test_aupro_equals_the_slow_definition_on_small_maps",
        "test_metrics.py::test_pixel_metrics_without_one_kind_of_pixel_are_undefined",
        "test_metrics.py::test_evaluate_maps_gives_a_reason_for_everything_undefined",
    ),
    "D7": (
        "test_detectors.py::test_battery[*-labels]",
        "test_api.py::test_fitting_never_looks_at_abnormal_images",
        "test_bootstrap.py::test_oracle_image_figures_are_those_of_the_f1_best_threshold",
    ),
    "D8": (
        "test_detectors.py::test_battery[*-round_trip]",
        "test_detectors.py::test_battery[*-model_file]",
        "test_training.py::test_a_signal_saves_and_a_resumed_run_ends_bit_equal",
    ),
    "D9": (
        "test_bootstrap.py::test_intervals_cover_a_known_auroc",
        "test_bootstrap.py::test_intervals_widen_when_images_come_from_few_patients",
        "test_win_table.py::test_a_paired_interval_is_of_seeds_and_images",
    ),
    "I1": ("test_io_raster.py::test_prefixes_are_refused_or_complete",),
    "I2": ("test_io_raster.py::test_corpora_give_an_image_or_an_input_error",),
    "I3": ("test_io_raster.py::test_mutants_give_an_image_or_an_input_error",),
    "I4": (
        "test_io_raster.py::test_16_bit_ramp_keeps_its_depth",
        "test_io_raster.py::test_big_endian_16_bit_tiff",
    ),
    "I5": (
        "test_io_raster.py::test_golden_values_of_each_mode",
        "test_io_raster.py::test_other_colour_spaces_become_rgb",
        "test_io_raster.py::test_palette_without_and_with_transparency",
        "test_io_raster.py::test_a_transparent_key_colour_becomes_black",
    ),
    "I6": (
        "test_io_raster.py::test_exif_orientation_of_image_and_mask",
        "test_io_raster.py::test_exif_orientation_of_jpeg",
    ),
    "I7": ("test_preprocess.py::test_small_images_are_refused",),
    "I8": (
        "test_io_raster.py::test_ceilings",
        "test_io_raster.py::test_bombs_are_refused_by_their_declared_size",
        "test_io_raster.py::test_jpeg_header_bomb",
        "test_io_dicom.py::test_rle_bomb_stops_at_the_size_of_the_frame",
    ),
    "I13": (
        "test_io_raster.py::test_content_decides_not_the_name",
        "test_io_raster.py::test_folder_empty_file_and_path_with_nul",
        "test_io_raster.py::test_pipes_sockets_and_devices_do_not_hang",
        "test_data.py::test_pipes_and_broken_links_with_the_names_of_images_are_not_passed_over",
    ),
    "I14": (
        "test_data.py::test_links_to_folders_are_not_followed",
        "test_io_raster.py::test_links_to_files_are_followed_and_loops_refused",
    ),
    "I15": (
        "test_report.py::test_no_text_becomes_markup_anywhere",
        "test_report.py::test_hostile_file_names_in_a_scored_page",
        "test_report.py::test_what_would_vanish_or_reverse_is_made_visible",
        "test_data.py::test_a_name_that_is_no_unicode_still_has_a_text_name",
    ),
    "I16": (
        "test_cli.py::test_score_skips_names_and_counts_what_it_cannot_read",
        "test_api.py::test_an_unreadable_file_refuses_before_fitting_or_is_left_out",
        "test_io_raster.py::test_no_permission",
        "test_io_raster.py::test_a_file_that_changes_while_it_is_read",
    ),
    "I17": (
        "test_io_raster.py::test_masks_are_united",
        "test_io_raster.py::test_masks_are_cut_above_half",
        "test_io_raster.py::test_label_numbers_do_not_silently_give_an_empty_mask",
        "test_io_raster.py::test_mask_of_another_size_names_both",
        "test_survey.py::test_masks_are_described_by_what_is_wrong_with_them",
        "test_bootstrap.py::test_abnormal_images_without_a_mask_are_left_out_of_pixel_metrics_only",
    ),
    "I18": (
        "test_splits.py::test_equal_and_near_images_stay_on_one_side",
        "test_splits.py::test_no_group_is_ever_divided",
        "test_survey.py::test_what_crosses_the_official_split_is_an_error",
        "test_api.py::test_a_fitted_image_in_an_official_test_part_is_an_error",
        "test_duplicates.py::test_a_lossless_copy_has_other_bytes_and_equal_pixels",
    ),
    "R0": (
        "test_cli.py::test_errors_have_their_exit_code_and_say_what_to_do",
        "test_io_child.py::test_a_child_opens_no_file_and_no_socket",
        "test_io_child.py::test_a_child_that_dies_with_a_file_names_the_file",
        "test_io_child.py::test_a_child_that_hangs_is_ended",
        "test_io_child.py::test_a_file_that_needs_too_much_memory_is_given_up",
        "test_io_child.py::test_a_file_that_takes_too_long_is_given_up",
        "test_io_child.py::test_hostile_files_end_alike_in_the_child_and_here",
        "test_io_dicom_refused.py::test_pydicoms_warnings_stay_silent_and_errors_are_one_kind",
        "test_io_nifti_hostile.py::test_whatever_goes_wrong_becomes_one_input_error",
        "test_io_raster.py::test_whatever_a_decoder_raises_becomes_one_input_error",
    ),
    "T5": ("test_api.py::test_an_unreadable_file_refuses_before_fitting_or_is_left_out",),
}
"""Case -> tests that prove (a part of) it under other names; `[*-end]` stands for parameters that end so."""

WHY = {"D4": "needs an accelerator; none where this was run"}
"""Case -> why it may have no test."""

_NAMED = re.compile(r"test_((?:[DIMRST]\d{1,2}_)+)")


def order(case: str) -> tuple[str, int]:
    """Sort key of a case: letters as in `MATRIX`, then by number. Raises ValueError for what is no case."""
    letter, number = case[:1], int(case[1:])
    return (f"{list(MATRIX).index(letter):02}" if letter in MATRIX else letter), number


def plain(node: str) -> str:
    """ "tests/test_x.py::test_y[z]" -> "test_x.py::test_y"."""
    return node.split("[", 1)[0].rsplit("/", 1)[-1]


def cases_of(node: str) -> set[str]:
    """The cases that a test counts for, by its name and by `ALSO`.

    Where the name has several and the parameters name some of these, only those count.
    """
    head, _, parameters = node.partition("[")
    found = _NAMED.match(head.rsplit("::", 1)[-1])
    named = set(found[1].rstrip("_").split("_")) if found else set()
    if len(named) > 1:
        named = named & set(re.findall(r"[A-Z]\d+", parameters)) or named
    return named | {case for case, tests in ALSO.items() if any(_matches(node, test) for test in tests)}


def cases_in(folder: Path) -> set[str]:
    """The cases that have a test in a folder."""
    found: set[str] = set()
    for path in folder.glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            test = f"{path.name}::{name}"
            found |= cases_of(test) | {case for case, tests in ALSO.items() if test in map(plain, tests)}
    return found


def _matches(node: str, pattern: str) -> bool:
    start, _, end = pattern.partition("[*")
    return plain(node) == start and (not end or node.endswith(end))


@dataclass
class Tally:
    """What one case came to; `left_out` counts tests that were not selected, such as slow ones."""

    tests: set[str] = field(default_factory=set)
    what: Counter[str] = field(default_factory=Counter)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    left_out: int = 0

    def add(self, *, tried: int, passed: int, what: str) -> None:
        """Count tries."""
        self.what[what] += tried
        self.passed += passed
        self.failed += tried - passed

    def to_json(self, case: str, *, exists: bool = False) -> dict[str, Any]:
        """The case's entry of the file; `exists`: it has a test, whether this session saw it or not."""
        what = "; ".join(
            f"{count} {'test' if (count, name) == (1, 'tests') else name}"
            for name, count in self.what.items()
        )
        if not self.what:
            absent = "not in this session" if exists else "no test"
            state = "skipped" if self.skipped else "not selected" if self.left_out else absent
            what = ": ".join(filter(None, [state, WHY.get(case, "")]))
        counts = {"tried": self.passed + self.failed, "passed": self.passed, "failed": self.failed}
        counts |= {"skipped": self.skipped, "left_out": self.left_out}
        return {"case": case, "tests": sorted(self.tests), **counts, "what": what}


class Collector:
    """Listens to a session and keeps, per test, its outcome and what it recorded."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.records: dict[str, list[Any]] = {}
        self.left_out: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown of a test; what failed in one of them has failed."""
        before = self.outcomes.get(report.nodeid)
        if before is None or report.outcome == "failed" or (report.when == "call" and before == "passed"):
            self.outcomes[report.nodeid] = report.outcome
        self.records[report.nodeid] = [value for key, value in report.user_properties if key == PROPERTY]

    def pytest_deselected(self, items: Iterable[Any]) -> None:
        """Tests that this session leaves out, such as slow ones; with xdist nobody is told of them."""
        self.left_out.update(item.nodeid for item in items)

    def tallies(self) -> dict[str, Tally]:
        """Case -> what it came to, in order; the whole matrix, and what else was recorded."""
        found: dict[str, Tally] = {case: Tally() for case in CASES}
        for node, outcome in self.outcomes.items():
            for case, tried in _tries(node, outcome, self.records[node]).items():
                tally = found.setdefault(case, Tally())
                tally.tests.add(plain(node))
                if outcome == "skipped":
                    tally.skipped += 1
                    continue
                for each in tried:
                    tally.add(**each)
        for node in self.left_out:
            for case in cases_of(node):
                found.setdefault(case, Tally()).left_out += 1
        return dict(sorted(found.items(), key=lambda item: order(item[0])))

    def to_json(self, facts: Mapping[str, object]) -> dict[str, Any]:
        """The whole file: facts about the run, then the cases."""
        known = cases_in(ROOT / "tests")
        cases = [tally.to_json(case, exists=case in known) for case, tally in self.tallies().items()]
        return {**facts, "ran": len(self.outcomes), "cases": cases}


def _tries(node: str, outcome: str, records: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Case -> tries of one test. A test that failed has at least one try that did."""
    found: dict[str, list[dict[str, Any]]] = {}
    ok = outcome == "passed"
    for record in records:
        try:
            case, tried, passed = str(record["case"]), int(record["tried"]), int(record["passed"])
            order(case)
        except (KeyError, TypeError, ValueError, IndexError):
            continue  # then the test counts by its name
        passed = passed if ok or passed < tried else max(0, tried - 1)
        found.setdefault(case, []).append(
            {"tried": tried, "passed": min(passed, tried), "what": str(record.get("what", "tries"))}
        )
    for case in cases_of(node) - found.keys():
        found[case] = [{"tried": 1, "passed": int(ok), "what": "tests"}]
    return found


def facts(selection: str) -> dict[str, object]:
    """Where and with what a session runs: no names of machines, no paths."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "platform": f"{platform.system()} {platform.machine()}",
        "when": datetime.now(UTC).date().isoformat(),
        "selection": selection,
    }


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "tests", "attacks")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def summary(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per case: "I1 256/256", with what was skipped or is missing."""
    lines = []
    for each in cases:
        notes = [
            f"{each[key]} {key.replace('_', ' ')}" for key in ("failed", "skipped", "left_out") if each[key]
        ]
        more = f" ({', '.join(notes)})" if notes else ""
        lines.append(f"{each['case']:<4}{each['passed']}/{each['tried']}{more}  {each['what']}")
    return lines


def to_bytes(found: Mapping[str, Any]) -> bytes:
    """The file's bytes: JSON that people can read."""
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
