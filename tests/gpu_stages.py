"""Stages that behave in every way, for tests/test_gpu_campaign.py."""

import os
import signal
import time


def right(stage, seconds=0.0):
    began = time.time()
    time.sleep(seconds)
    stage.line("times", began=began, ended=time.time(), wrong=0)
    stage.figure("speed", lambda: {"ms": 1.0})


def wrong(stage):
    stage.line("value", wrong=2)


def raising(stage):
    stage.figure("one", lambda: 1 / 0)  # the others go on
    stage.figure("two", lambda: {"ms": 2.0})
    raise RuntimeError("no driver")


def hanging(stage):
    stage.line("before", ms=3.0)
    time.sleep(60)


def killed(stage):
    os.kill(os.getpid(), signal.SIGKILL)
