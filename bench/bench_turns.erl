%% What the benchmarks share whose sides take turns on one disk.
-module(bench_turns).

-export([order/2, in_turns/1, nanoseconds/1]).
-export([new_root/2, file_name/1, payload/1]).

-define(MIB, 1048576).

%% Who comes first changes from round to round, and so does who comes after whom.
-spec order(Round :: pos_integer(), [Side]) -> [Side].
order(Round, Sides) ->
    Orders = permutations(Sides),
    lists:nth(Round rem length(Orders) + 1, Orders).

permutations([]) -> [[]];
permutations(List) -> [[First | Rest] || First <- List, Rest <- permutations(List -- [First])].

%% Each in a process of its own, so that what it loaded is gone before the next begins.
-spec in_turns([{Side, fun(() -> term())}]) -> [{Side, Nanoseconds :: integer()}].
in_turns(Sides) ->
    [
        begin
            {Pid, Monitor} = spawn_monitor(fun() -> exit({took, nanoseconds(Fun)}) end),
            receive {'DOWN', Monitor, process, Pid, {took, Time}} -> {Side, Time} end
        end
     || {Side, Fun} <- Sides
    ].

-spec nanoseconds(fun(() -> term())) -> integer().
nanoseconds(Fun) ->
    Begun = erlang:monotonic_time(nanosecond),
    _ = Fun(),
    erlang:monotonic_time(nanosecond) - Begun.

%% A new directory in that which the environment's variable names.
-spec new_root(Variable :: string(), Default :: string()) -> binary().
new_root(Variable, Default) ->
    Name = "erllama_cache_bench." ++ os:getpid(),
    Root = filename:join(os:getenv(Variable, Default), Name),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    unicode:characters_to_binary(Root).

-spec file_name(Key :: binary()) -> binary().
file_name(Key) ->
    <<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>.

%% Random enough that nothing below can compress it.
-spec payload(Bytes :: pos_integer()) -> binary().
payload(Bytes) ->
    Chunk = rand:bytes(min(Bytes, ?MIB)),
    binary:copy(Chunk, Bytes div byte_size(Chunk)).
