%% Turns on the dirty I/O schedulers. Saves and loads take a turn for each slice of theirs: there
%% are fewer turns than such schedulers, so that whatever else in this node needs one, be it a look
%% at a file, finds one free, however many saves and loads wait for a disk.
%%
%% Turns are slots of a semaphore of their own: fair, and given back when their owner dies. A
%% process has one guard for them, made at its first turn.
%%
%% @private
-module(erllama_cache_turn).

-export([setup/0, run/1, run/3, run_slices/2]).

%% So many schedulers are left to others.
-define(LEFT, 2).
%% The entry in a process's dictionary.
-define(GUARD, '$erllama_cache_turns').

%% Makes the turns, once for the library's life.
-spec setup() -> ok.
setup() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            make_turns();
        Semaphore ->
            try erllama_cache_nif:semaphore_limit(Semaphore) of
                _ -> ok
            catch
                %% Of a library that has been purged since.
                error:badarg -> make_turns()
            end
    end.

make_turns() ->
    Schedulers = erlang:system_info(dirty_io_schedulers),
    persistent_term:put(?MODULE, erllama_cache_nif:semaphore_new(max(1, Schedulers - ?LEFT))).

%% Makes one call of the library when it is its turn. The call takes the guard of the turn, so that
%% this is not over before the call is, whatever becomes of the process. It does not nest.
-spec run(fun((erllama_cache_nif:guard()) -> Result)) -> Result.
run(Call) ->
    Guard = guard(),
    ok = take(Guard, infinity, fun() -> ok end),
    call(Guard, Call).

%% The same. Until the turn comes, `Meanwhile' runs each so many milliseconds; with its error the
%% wait is over, and the call is not made.
-spec run(fun((erllama_cache_nif:guard()) -> Result), timeout(), fun(() -> ok | Error)) ->
    Result | {gave_up, Error}.
run(Call, Every, Meanwhile) ->
    Guard = guard(),
    case take(Guard, Every, Meanwhile) of
        ok -> call(Guard, Call);
        Error -> {gave_up, Error}
    end.

%% What a call begins that may be too long for one turn, and others end, each in a turn of its own.
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
        ok ->
            ok;
        busy ->
            Ref = make_ref(),
            case erllama_cache_nif:acquire_or_queue(Guard, 1, 0, Ref) of
                ok -> ok;
                queued -> await(Guard, Ref, Every, Meanwhile)
            end
    end.

await(Guard, Ref, Every, Meanwhile) ->
    receive
        {Ref, granted} -> ok
    after Every ->
        try Meanwhile() of
            ok ->
                await(Guard, Ref, Every, Meanwhile);
            Error ->
                ok = leave(Guard, Ref),
                Error
        catch
            Class:Reason:Stack ->
                ok = leave(Guard, Ref),
                erlang:raise(Class, Reason, Stack)
        end
    end.

leave(Guard, Ref) ->
    case erllama_cache_nif:give_up(Guard) of
        withdrawn ->
            ok;
        decided ->
            receive
                {Ref, granted} -> ok
            end,
            _ = erllama_cache_nif:release(Guard),
            ok
    end.
