"""Carries out the commands that load and unload cartridges.

A load is answered when the worker has written the pages. Commands are carried out at the end of a
turn, when the sequences that ended in it have given back their pages. An unload is decided when it
comes, so that no request that comes after it finds the cartridge.
"""

from __future__ import annotations

from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    Control,
    LoadCartridge,
    UnloadCartridge,
    WriteCartridge,
)
from tokasaurus.rounding import ceil_div

__all__ = ["CartridgeCommands"]


class CartridgeCommands:
    """The commands of one replica, from their arrival to their answers.

    Args:
        running: has the cartridges and their pages.
        backlog: has the requests that name them.
    """

    def __init__(self, running: RunningSequences, backlog: Backlog) -> None:
        self._pages, self._cartridges = running.pages, running.cartridges
        self._in_flight = running.in_flight
        self._backlog = backlog
        self._waiting: list[Command] = []
        # By the number of the control that writes a cartridge: its name, and the id of the load.
        self._writing: dict[int, tuple[str, int]] = {}

    def take(self, command: Command) -> CommandFailed | None:
        """Takes in a load or an unload; returns the answer if it fails already."""
        action = command.action
        if isinstance(action, UnloadCartridge):
            if self._cartridges.find(action.name) is None:
                reason = f"no cartridge {action.name!r} is loaded"
                return CommandFailed(command.command_id, reason, "name")
            if self._is_named(action.name):
                reason = f"a request that has not ended names cartridge {action.name!r}"
                return CommandFailed(command.command_id, reason, "name")
            self._cartridges.hide(action.name)
        self._waiting.append(command)
        return None

    def carry_out(self) -> tuple[list[Control], list[CommandDone | CommandFailed]]:
        """Carries out what was taken in; returns controls to send, and answers."""
        controls: list[Control] = []
        answers: list[CommandDone | CommandFailed] = []
        for command in self._waiting:
            action = command.action
            if isinstance(action, UnloadCartridge):
                answers.append(self._unload(command.command_id, action.name))
            elif isinstance(action, LoadCartridge):
                failure = self._why_not(action)
                if failure is None:
                    controls.append(self._load(command.command_id, action))
                else:
                    field, reason = failure
                    answers.append(CommandFailed(command.command_id, reason, field))
        self._waiting.clear()
        return controls, answers

    def written(self, number: int, error: str | None) -> CommandDone | CommandFailed:
        """The worker is done with the control of this number, which wrote a cartridge."""
        name, command_id = self._writing.pop(number)
        if error is not None:
            self._cartridges.remove(name)
            return CommandFailed(command_id, error, "path")
        self._cartridges.finish(name)
        return CommandDone(command_id)

    def _is_named(self, name: str) -> bool:
        """Whether a request that has not ended names this cartridge."""
        return any(
            name in request.message.cartridges for request in self._backlog.requests.values()
        )

    def _why_not(self, action: LoadCartridge) -> tuple[str, str] | None:
        """The field that is wrong and the reason, where a cartridge cannot be loaded."""
        if action.name in self._cartridges:
            return "name", f"cartridge {action.name!r} is loaded already"
        if action.num_tokens < 1:
            return "num_tokens", f"num_tokens is {action.num_tokens}; it must be at least 1"
        if action.num_tokens > self._cartridges.num_ids_left:
            return "num_tokens", "this manager has given out all its pseudo ids; restart the engine"
        num_pages = ceil_div(action.num_tokens, self._pages.page_size)
        num_available = self._pages.num_available
        wanted = f"a cartridge of {action.num_tokens} tokens takes {num_pages} pages of KV cache"
        if num_pages > num_available:
            return "num_tokens", f"{wanted}, and {num_available} are available"
        num_left = self._pages.pool.num_pages - self._pages.num_pinned - num_pages
        num_wanted = self._most_pages_of_a_request()
        if num_wanted > num_left:
            reason = f"it would leave {num_left}, and a request that was accepted may need"
            return "num_tokens", f"{wanted}; {reason} {num_wanted}"
        return None

    def _most_pages_of_a_request(self) -> int:
        """Pages that one sequence may need beside pinned ones; the most of all living requests."""
        page_size = self._pages.page_size
        return max(
            (
                ceil_div(request.final_length, page_size) - request.num_pseudo // page_size
                for request in self._backlog.requests.values()
            ),
            default=0,
        )

    def _load(self, command_id: int, action: LoadCartridge) -> Control:
        cartridge = self._cartridges.begin(action.name, action.path, action.num_tokens)
        control = self._control(cartridge)
        self._writing[control.number] = action.name, command_id
        return control

    def _control(self, cartridge: Cartridge) -> Control:
        action = WriteCartridge(cartridge.path, cartridge.num_tokens, cartridge.pages)
        control = Control(self._in_flight.next_number, action)
        self._in_flight.add_control(control)
        return control

    def _unload(self, command_id: int, name: str) -> CommandDone:
        num_pages, num_tokens = self._cartridges.remove(name)
        return CommandDone(command_id, num_pages=num_pages, num_tokens=num_tokens)
