"""Judges of a run: an event loop in a thread of its own, with any number of open questions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future

from roll_r3.config.findings.readable import readable
from roll_r3.config.judge_prompts import question
from roll_r3.config.rewards import JudgeConfig
from roll_r3.errors import ConfigError
from roll_r3.rewards.functions import Response
from roll_r3.rewards.judge.chat_client import ChatClient, JudgeError
from roll_r3.rewards.judge.verdicts import read_verdict
from roll_r3.rewards.reward_process import Answer, Failure, Undecided

_SHOWN = 200


class Judges:
    """Judges by the index of their rule."""

    def __init__(self, judges: Mapping[int, JudgeConfig]) -> None:
        self._judges = judges
        self._clients: dict[int, ChatClient] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; without judges do nothing.

        Raises:
            ConfigError: a key is missing in the environment.
        """
        if not self._judges:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judges", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        except JudgeError as error:
            self.close()
            raise ConfigError(f"rewards: {error}") from error

    def close(self) -> None:
        """End the thread. Open questions are cancelled."""
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def submit(self, rule: int, response: Response) -> Future[Answer]:
        """Ask the judge of a rule, and return at once."""
        assert self._loop is not None, "start comes first"
        return asyncio.run_coroutine_threadsafe(self._judge(rule, response), self._loop)

    async def _judge(self, rule: int, response: Response) -> Answer:
        judge = self._judges[rule]
        asked = question(
            judge.prompt, prompt=response.prompt, response=response.response, ground_truth=response.ground_truth
        )
        try:
            verdict = await self._clients[rule].verdict(asked)
        except JudgeError as error:
            return Failure(f"gave no verdict: {error}")
        score = read_verdict(verdict, judge.score)
        return Undecided(f"gave the verdict {readable(verdict[:_SHOWN])}") if score is None else score

    async def _connect(self) -> None:
        for rule, judge in self._judges.items():
            self._clients[rule] = ChatClient(judge)

    async def _disconnect(self) -> None:
        open_tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()
