"""The harness itself: every planted bug is caught under some schedule, and sound kernels pass under all of them."""

import re
from types import ModuleType

import pytest
import torch

SCHEDULES = [(seed, interleaved) for seed in range(8) for interleaved in (False, True)]

SOUND = {
    "reverse_with_barrier": [63, 62, 61],
    "shift_in_a_warp": [1, 0, 3],
    "reverse_by_copies": [63, 62, 63],
    "count_with_atomics": [192, 1, 2],
    "product_of_tiles": [14, 38, 62],
    "sum_by_the_last_block": [1, 1, 1],
    "core_function": [5, 6, 7],
    "neighbours": [163, 162, 161],
    "neighbours_in_turns": [0, 0, 0],
    "blocks_of_a_cluster_through_memory": [1, 1, 1],
    "launched_tile": [1, 1, 1],
}
# What the report must say; the first word is the kernel's name, then block, thread and the line.
BROKEN = {
    "reverse_without_barrier": "race at tile",
    "shift_without_warp_barrier": "race at tile|unwritten read of shared tile",
    "reuse_without_barrier": "race at tile",
    "barrier_in_a_branch": "barrier that thread [0-9]+ cannot reach|waits for ever: barrier",
    "two_barriers_that_differ": "diverged barrier: thread [0-9]+ waits at planted.cpp",
    "shuffle_in_a_branch": "warp collective that thread [0-9]+ cannot reach|waits for ever: warp collective",
    "two_calls_of_a_shuffle": (
        r"diverged warp collective: thread [0-9]+ waits at planted.cpp:\d+, called at planted.cpp:\d+"
    ),
    "two_calls_of_a_barrier": r"diverged barrier: thread [0-9]+ waits at planted.cpp:\d+, called at planted.cpp:\d+",
    "product_of_half_a_tile": "warp collective that thread [0-9]+ cannot reach|waits for ever: warp collective",
    "early_return": "barrier that thread 5 cannot reach|waits for ever: barrier",
    "off_by_one": "index 256 of a global buffer of 256",
    "before_the_first": "index -1 of a global buffer of 256",
    "shared_off_by_one": r"index 64 of shared tile\[64\]",
    "does_not_wait_for_earlier_launches": r"global memory before after_earlier_launches\(\)",
    "leaves_before_earlier_launches": r"the kernel is left without after_earlier_launches\(\)",
    "core_function_off_by_one": r"unwritten read of shared tile\[64\]|index 64 of shared tile\[64\]",
    "core_function_without_barrier": "race at tile|unwritten read of shared tile",
    "crooked_vector": "a vector of 16 bytes at an address",
    "unwritten_read": r"unwritten read of shared tile\[7\]",
    "unwritten_counter": "unwritten read of shared counter",
    "copies_not_waited_for": r"unwritten read of shared tile\[[0-9]+\]",
    "copies_without_barrier": r"unwritten read of shared tile\[[0-9]+\]|race at tile",
    "copies_over_what_is_read": "race at tile.*a write here, a read by block|unwritten read of shared tile",
    "copies_left_behind": "it leaves the kernel without waiting for its copies",
    "crooked_copy": r"a copy to shared tile\[2\], not a multiple of 16 bytes",
    "two_blocks_write": "race at global memory.*a write here, a write by block",
    "a_block_reads_another_s": "race at global memory",
    "plain_read_of_a_counter": "race at global memory.*an atomic",
    "sum_by_a_block_that_does_not_wait": "race at global memory.*a read here, a write by block",
    "late_write": "race at global memory",
    "dirty_ticket": "ticket 0 stood at 7 of 2",
    "launched_tile_off_by_one": r"index 64 of shared tile\[64\]",
    "neighbours_without_barrier": "race at tile.*a read here, a write by block",
    "neighbours_overwritten": "race at tile.*a write here, a read by block",
    "leaves_before_it_is_read": (
        "a read of the shared memory of block [0-9], which leaves the kernel without a cluster barrier after it"
        "|a read of shared tile of block [0-9], which has left the kernel"
    ),
    "rank_out_of_range": "rank 4 of a cluster of 4",
    "two_cluster_barriers_that_differ": "diverged cluster barrier: (block [0-9] )?thread [0-9]+ waits at planted.cpp",
    "cluster_barrier_of_some": "cluster barrier that block 1 thread 0 cannot reach|waits for ever: cluster barrier",
    "barriers_of_two_kinds": "waits for ever: (cluster )?barrier that others of the (cluster|block) do not reach",
    "unwritten_remote_read": r"block 1 thread 7,.* unwritten read of shared tile\[7\]",
    "other_cluster_through_memory": "race at global memory",
}


def reports(harness: ModuleType, name: str) -> list[str | None]:
    """What the harness says of one kernel under every schedule; None where it passes."""
    found: list[str | None] = []
    for seed, interleaved in SCHEDULES:
        harness.set_schedule(seed, interleaved)
        try:
            harness.planted(name)
            found.append(None)
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_bug_is_reported_with_kernel_block_thread_and_line(harness: ModuleType, name: str) -> None:
    said = [report for report in reports(harness, name) if report is not None]
    assert len(said) >= len(SCHEDULES) // 4, f"only {len(said)} of {len(SCHEDULES)} schedules show it"
    for report in said:
        assert re.match(rf"{name}, block \d+ thread \d+, (planted\.cpp:\d+|end:0): ", report), report
    assert any(re.search(BROKEN[name], report) for report in said), said


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_passes_under_every_schedule(harness: ModuleType, name: str) -> None:
    for seed, interleaved in SCHEDULES:
        harness.set_schedule(seed, interleaved)
        assert harness.planted(name)[:3] == SOUND[name]


def test_a_result_that_depends_on_the_order_of_blocks_differs_between_schedules(harness: ModuleType) -> None:
    results = set()
    for seed, interleaved in SCHEDULES:
        harness.set_schedule(seed, interleaved)
        results.add(tuple(harness.planted("depends_on_block_order")[:3]))
    assert len(results) > 2


def test_tiles_are_multiplied_as_matrices(harness: ModuleType) -> None:
    counted = torch.arange(64).view(16, 4)
    assert harness.planted("product_of_tiles")[:128] == (counted @ counted[:8].T).flatten().tolist()


def test_the_ticket_is_left_as_it_was_found(harness: ModuleType) -> None:
    assert harness.planted("sum_by_the_last_block")[-1] == 0


def test_every_planted_kernel_is_tested(harness: ModuleType) -> None:
    assert sorted(harness.planted_names()) == sorted([*SOUND, *BROKEN, "depends_on_block_order"])


def test_the_same_schedule_is_the_same_run(harness: ModuleType) -> None:
    def counts(seed: int) -> dict[str, int]:
        harness.set_schedule(seed, True)
        harness.planted("sum_by_the_last_block")
        return dict(harness.counts())

    assert counts(5) == counts(5)
    assert len({counts(seed)["switches"] for seed in range(6)}) > 1
