"""Processes that do not outlive the one that started them."""

import os
import threading
import time


def die_with_parent(parent: int | None = None) -> None:
    """End this process when its parent is gone, so that a killed run leaves no trainer behind.

    `parent` is the process that started it, which may be gone already when this is called; else the parent of now.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
