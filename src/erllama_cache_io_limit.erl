%% Limits how many dirty I/O schedulers the library uses at once. Each slice of a save or a load
%% takes a turn. There are fewer turns than such schedulers, so that other users of files in this
%% node find one free, however many saves and loads wait for a disk.
%%
%% Turns are slots of a semaphore of their own: fair, and released when their owner dies. A process
%% has one guard for them, made at its first turn.
%%
%% @private
-module(erllama_cache_io_limit).

-export([setup/0, run/1, run/3, run_slices/2]).

%% Schedulers that are left to others.
-define(LEFT, 2).
%% This module's entry in a process's dictionary.
-define(GUARD, '$erllama_cache_turns').

%% Makes the turns, once in the library's life.
-spec setup() -> ok.
setup() ->
    Before = persistent_term:get(?MODULE, undefined),
    persistent_term:put(?MODULE, erllama_cache_successor:inherit(Before, fun new/0)).

new() ->
    Schedulers = erlang:system_info(dirty_io_schedulers),
    erllama_cache_nif:semaphore_new(max(1, Schedulers - ?LEFT)).

%% Makes one call of the library, in its turn. The call gets the turn's guard, so that the turn does
%% not end before the call, even if the process is killed. Turns do not nest.
-spec run(fun((erllama_cache_nif:guard()) -> Result)) -> Result.
run(Call) ->
    Guard = guard(),
    granted = take(Guard, infinity, fun() -> ok end),
    call(Guard, Call).

%% The same. Until the turn comes, `Meanwhile' runs every so many milliseconds. An error of it ends
%% the wait, and the call is not made.
-spec run(fun((erllama_cache_nif:guard()) -> Result), timeout(), fun(() -> ok | Error)) ->
    Result | {gave_up, Error}.
run(Call, Every, Meanwhile) ->
    Guard = guard(),
    case take(Guard, Every, Meanwhile) of
        granted -> call(Guard, Call);
        {gave_up, Error} -> {gave_up, Error}
    end.

%% Begins what may be too long for one turn, and continues it, each slice in a turn of its own.
-spec run_slices(
    fun((erllama_cache_nif:guard()) -> {more, Begun} | Result),
    fun((erllama_cache_nif:guard(), Begun) -> more | Result)
) -> Result.
run_slices(Begin, Continue) ->
    case run(Begin) of
        {more, Begun} -> until_done(fun(Turn) -> Continue(Turn, Begun) end);
        Result -> Result
    end.

until_done(Slice) ->
    case run(Slice) of
        more -> until_done(Slice);
        Result -> Result
    end.

call(Guard, Call) ->
    try
        Call(Guard)
    after
        _ = erllama_cache_nif:release(Guard)
    end.

guard() ->
    case get(?GUARD) of
        undefined ->
            Guard = erllama_cache_nif:guard_new(persistent_term:get(?MODULE)),
            _ = put(?GUARD, Guard),
            Guard;
        Guard ->
            Guard
    end.

take(Guard, Every, Meanwhile) ->
    case erllama_cache_nif:try_acquire(Guard) of
        ok -> granted;
        busy -> erllama_cache_waiter:wait_meanwhile(Guard, 1, 0, Every, Meanwhile)
    end.
