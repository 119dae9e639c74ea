"""LuaJIT in this process: the library that the Lua module of Nginx runs on, with the modules of the gateway.

Debian's program `luajit` cannot be installed beside that module, and a program would have to be started for each question; here a test can ask
many thousand. What a Lua function gets and returns are strings, numbers, booleans, None, and lists and dictionaries of them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "roles/gateway/files/lua"
LIBRARY = "libluajit-5.1.so.2"
GLOBALS = -10002
NIL, BOOLEAN, NUMBER, STRING, TABLE, FUNCTION = 0, 1, 3, 4, 5, 6
ALL = -1


class LuaError(Exception):
    """What error() or assert() said in Lua."""


def library() -> ctypes.CDLL:
    """The library, with what its functions take and return where that is no int."""
    found = ctypes.CDLL(LIBRARY)
    state, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, *arguments in (
        ("luaL_newstate", state),
        ("luaL_openlibs", None, state),
        ("lua_close", None, state),
        ("luaL_loadbuffer", ctypes.c_int, state, text, size, text),
        ("lua_pcall", ctypes.c_int, state, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ("lua_gettop", ctypes.c_int, state),
        ("lua_settop", None, state, ctypes.c_int),
        ("lua_type", ctypes.c_int, state, ctypes.c_int),
        ("lua_toboolean", ctypes.c_int, state, ctypes.c_int),
        ("lua_tonumber", ctypes.c_double, state, ctypes.c_int),
        ("lua_tolstring", ctypes.c_void_p, state, ctypes.c_int, ctypes.POINTER(size)),
        ("lua_pushnil", None, state),
        ("lua_pushboolean", None, state, ctypes.c_int),
        ("lua_pushnumber", None, state, ctypes.c_double),
        ("lua_pushlstring", None, state, text, size),
        ("lua_createtable", None, state, ctypes.c_int, ctypes.c_int),
        ("lua_settable", None, state, ctypes.c_int),
        ("lua_getfield", None, state, ctypes.c_int, text),
        ("lua_pushvalue", None, state, ctypes.c_int),
        ("lua_next", ctypes.c_int, state, ctypes.c_int),
        ("luaL_ref", ctypes.c_int, state, ctypes.c_int),
        ("lua_rawgeti", None, state, ctypes.c_int, ctypes.c_int),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class Function:
    """A function of Lua; called, it returns what the Lua function returns: None, one value, or a tuple."""

    def __init__(self, lua: Lua, reference: int) -> None:
        self.lua, self.reference = lua, reference

    def __call__(self, *arguments: Any) -> Any:
        return self.lua.call(self, arguments)


class Lua:
    """A state of LuaJIT that finds the gateway's modules."""

    REGISTRY = -10000

    def __init__(self) -> None:
        self.c = library()
        self.state = self.c.luaL_newstate()
        self.c.luaL_openlibs(self.state)
        self.run(f"package.path = '{MODULES}/?.lua;' .. package.path")

    def close(self) -> None:
        """Give its memory back."""
        self.c.lua_close(self.state)

    def run(self, code: str, *arguments: Any) -> Any:
        """Run a piece of Lua, which finds its arguments in `...`."""
        raw = code.encode()
        if self.c.luaL_loadbuffer(self.state, raw, len(raw), b"=test"):
            raise LuaError(self.pop())
        return self.called(arguments)

    def call(self, function: Function, arguments: tuple[Any, ...]) -> Any:
        """Call a function of Lua."""
        self.c.lua_rawgeti(self.state, self.REGISTRY, function.reference)
        return self.called(arguments)

    def called(self, arguments: tuple[Any, ...]) -> Any:
        """Call what lies on the stack."""
        below = self.c.lua_gettop(self.state) - 1
        for argument in arguments:
            self.push(argument)
        if self.c.lua_pcall(self.state, len(arguments), ALL, 0):
            raise LuaError(self.pop())
        results = [self.value(index) for index in range(below + 1, self.c.lua_gettop(self.state) + 1)]
        self.c.lua_settop(self.state, below)
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def pop(self) -> Any:
        """Take one value from the stack."""
        value = self.value(-1)
        self.c.lua_settop(self.state, -2)
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def push(self, value: Any) -> None:
        """Put a value of Python on the stack."""
        if value is None:
            self.c.lua_pushnil(self.state)
        elif isinstance(value, bool):
            self.c.lua_pushboolean(self.state, value)
        elif isinstance(value, int | float):
            self.c.lua_pushnumber(self.state, value)
        elif isinstance(value, bytes | str):
            raw = value.encode() if isinstance(value, str) else value
            self.c.lua_pushlstring(self.state, raw, len(raw))
        elif isinstance(value, Function):
            self.c.lua_rawgeti(self.state, self.REGISTRY, value.reference)
        elif isinstance(value, dict):
            self.push_items(value.items())
        else:
            self.push_items(enumerate(value, 1))

    def push_items(self, items: Any) -> None:
        """Put a table on the stack."""
        self.c.lua_createtable(self.state, 0, 0)
        for key, value in items:
            self.push(key)
            self.push(value)
            self.c.lua_settable(self.state, -3)

    def value(self, index: int) -> Any:
        """A value of the stack; strings as bytes, tables as dictionaries (keys that are strings as str), or as lists when they count from 1."""
        kind = self.c.lua_type(self.state, index)
        if kind == BOOLEAN:
            return bool(self.c.lua_toboolean(self.state, index))
        if kind == NUMBER:
            number = self.c.lua_tonumber(self.state, index)
            return int(number) if number == number // 1 and abs(number) < 2**53 else number
        if kind == STRING:
            size = ctypes.c_size_t()
            return ctypes.string_at(self.c.lua_tolstring(self.state, index, ctypes.byref(size)), size.value)
        if kind == TABLE:
            return self.table(index)
        if kind == FUNCTION:
            self.c.lua_pushvalue(self.state, index)
            return Function(self, self.c.luaL_ref(self.state, self.REGISTRY))
        return None

    def table(self, index: int) -> Any:
        """A table of the stack."""
        found = {}
        self.c.lua_pushvalue(self.state, index)
        self.c.lua_pushnil(self.state)
        while self.c.lua_next(self.state, -2):
            key, value = self.value(-2), self.value(-1)
            found[key.decode(errors="surrogateescape") if isinstance(key, bytes) else key] = value
            self.c.lua_settop(self.state, -2)
        self.c.lua_settop(self.state, -2)
        return (
            [found[number] for number in sorted(found)]
            if found and set(found) == set(range(1, len(found) + 1))
            else found
        )
