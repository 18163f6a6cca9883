"""Threads that decode and crop, each on one core, for data that is read on demand."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from common.errors import UserError


def worker_pool(workers: int) -> ThreadPoolExecutor:
    """Threads whose torch operations run on one core each; the caller's number of threads is as before.

    Without this every worker would start another OpenMP team for each copy of a large image.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one thread is needed")

    def one_core() -> None:
        torch.get_num_threads()  # a thread's first look would otherwise come later and take the default after all
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images", initializer=one_core)
    started = threading.Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(started.wait)
    started.wait()
    # The number is kept per OpenMP thread, but also as the default of threads to come: put that one back.
    torch.set_num_threads(before)
    return pool


def wait_for(futures: Iterable[Future]) -> None:
    """Wait for all; raise the first error and drop what has not started."""
    futures = list(futures)
    try:
        for future in futures:
            future.result()
    except MemoryError as error:
        raise UserError(
            "not enough memory to decode and crop: use fewer --workers or a smaller --batch-size"
        ) from error
    finally:
        for future in futures:
            future.cancel()
