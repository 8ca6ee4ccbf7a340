"""CPU quota and free memory, read from made-up /proc and cgroup trees."""

from __future__ import annotations

import os

import pytest

from septet import machine


@pytest.fixture
def tree(tmp_path):
    """write(path, text) under a made-up root; .proc and .cgroup are its two parts."""

    class Tree:
        proc = tmp_path / "proc"
        cgroup = tmp_path / "cgroup"

        def write(self, path: str, text: str) -> None:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def quota(self) -> float | None:
            return machine.cpu_quota(self.proc, self.cgroup)

        def memory(self) -> int:
            return machine.available_memory(self.proc, self.cgroup)

    return Tree()


def test_no_cgroups_no_quota(tree):
    assert tree.quota() is None


def test_v2_quota_of_the_tightest_group_counts(tree):
    tree.write("proc/self/cgroup", "0::/a/b\n")
    tree.write("cgroup/a/cpu.max", "150000 100000\n")
    tree.write("cgroup/a/b/cpu.max", "400000 100000\n")
    assert tree.quota() == 1.5


def test_v2_max_is_no_limit(tree):
    tree.write("proc/self/cgroup", "0::/\n")
    tree.write("cgroup/cpu.max", "max 100000\n")
    assert tree.quota() is None


def test_v2_inside_a_container_whose_path_is_not_mounted(tree):
    tree.write("proc/self/cgroup", "0::/../../docker/abc\n")
    tree.write("cgroup/cpu.max", "200000 100000\n")
    assert tree.quota() == 2.0


def test_v1_quota(tree):
    tree.write("proc/self/cgroup", "4:memory:/x\n3:cpu,cpuacct:/x\n")
    tree.write("cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "250000\n")
    tree.write("cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n")
    assert tree.quota() == 2.5


def test_v1_minus_one_is_no_limit(tree):
    tree.write("proc/self/cgroup", "3:cpu:/\n")
    tree.write("cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    tree.write("cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert tree.quota() is None


def test_usable_cpus_is_the_quota_rounded_up_and_at_most_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, cpus in ((None, 8), (0.2, 1), (2.5, 3), (64.0, 8)):
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        assert machine.usable_cpus() == cpus


def test_thread_env_keeps_what_the_user_set():
    added = machine.thread_env({"OMP_NUM_THREADS": "7"}, 2)
    assert "OMP_NUM_THREADS" not in added
    assert added["MKL_NUM_THREADS"] == "2"
    assert added["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in machine.thread_env({"OMP_WAIT_POLICY": "ACTIVE"}, 2)


def test_memory_without_cgroups_is_memavailable(tree):
    tree.write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert tree.memory() == 4000 * 1024


def test_memory_under_a_v2_limit_counts_droppable_pages_as_free(tree):
    tree.write("proc/meminfo", "MemAvailable: 9000000 kB\n")
    tree.write("proc/self/cgroup", "0::/job\n")
    tree.write("cgroup/job/memory.max", "1000000\n")
    tree.write("cgroup/job/memory.current", "700000\n")
    tree.write("cgroup/job/memory.stat", "anon 400000\ninactive_file 200000\n")
    assert tree.memory() == 500_000


def test_memory_under_a_v1_limit(tree):
    tree.write("proc/meminfo", "MemAvailable: 9000000 kB\n")
    tree.write("proc/self/cgroup", "9:memory:/\n")
    tree.write("cgroup/memory/memory.limit_in_bytes", "1000000")
    tree.write("cgroup/memory/memory.usage_in_bytes", "900000")
    assert tree.memory() == 100_000
