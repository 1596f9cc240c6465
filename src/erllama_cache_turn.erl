%% Turns on the dirty I/O schedulers. Large saves and loads work in slices, and each slice takes a
%% turn first: there are fewer turns than such schedulers, so that whoever else in this node needs
%% one, be it for a look at a file, finds one free, however many saves run.
%%
%% Turns are slots of a semaphore of their own: fair, and given back when their owner dies.
%%
%% @private
-module(erllama_cache_turn).

-export([setup/0, new/0, run/2]).
-export_type([turn/0]).

-opaque turn() :: erllama_cache_nif:guard().

%% So many schedulers are left to others.
-define(LEFT, 2).

%% Makes the turns, once for the node's life.
-spec setup() -> ok.
setup() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            Schedulers = erlang:system_info(dirty_io_schedulers),
            Semaphore = erllama_cache_nif:semaphore_new(max(1, Schedulers - ?LEFT)),
            persistent_term:put(?MODULE, Semaphore);
        _Semaphore ->
            ok
    end.

%% For one save or load.
-spec new() -> turn().
new() ->
    erllama_cache_nif:guard_new(persistent_term:get(?MODULE)).

%% Runs one slice when it is its turn.
-spec run(turn(), fun(() -> Result)) -> Result.
run(Turn, Slice) ->
    ok = take(Turn),
    try
        Slice()
    after
        _ = erllama_cache_nif:release(Turn)
    end.

take(Turn) ->
    case erllama_cache_nif:try_acquire(Turn) of
        ok ->
            ok;
        busy ->
            Ref = make_ref(),
            case erllama_cache_nif:acquire_or_queue(Turn, 1, 0, Ref) of
                ok -> ok;
                queued -> receive {Ref, granted} -> ok end
            end
    end.
