%% What the running writer is set up with, for processes that must not ask a server: the semaphore,
%% the host, how files are written. It stays when the writer ends, until the next one replaces it.
%%
%% @private
-module(erllama_cache_setup).

-export([put/1, find/0, get/3]).
-export_type([setup/0]).

-type setup() :: #{
    semaphore := erllama_cache_nif:semaphore(),
    host := module(),
    keyed_by := erllama_cache_host:keyed_by(),
    secret := none | erllama_cache_nif:secret(),
    defaults := erllama_cache_meta:defaults(),
    options := #{erllama_cache_host:tier() => erllama_cache_nif:save_options()},
    %% Of saves behind their callers, if there are any.
    options_behind => #{erllama_cache_host:tier() => erllama_cache_nif:save_options()},
    slow_save_ms := pos_integer(),
    write_behind := off | erllama_cache_config:write_behind(),
    drain_ms := non_neg_integer(),
    %% The tier servers of its host, as those who lend and borrow: see erllama_cache_peer_tier.
    borrower := none | tuple(),
    %% For one save: it has been asked for already.
    root => {file:name_all(), erllama_cache_nif:root()},
    atom() => term()
}.

-spec put(setup()) -> ok.
put(Setup) ->
    persistent_term:put(?MODULE, Setup).

-spec find() -> {ok, setup()} | error.
find() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined -> error;
        Setup -> {ok, Setup}
    end.

%% Exits with `{noproc, _}' when there was no writer yet, in the name of this call.
-spec get(module(), atom(), list()) -> setup().
get(Module, Function, Args) ->
    case find() of
        {ok, Setup} -> Setup;
        error -> exit({noproc, {Module, Function, Args}})
    end.
