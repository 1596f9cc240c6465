%% The store as a host, with something that happens when a save asks whether its reservation stands:
%% a small save before it writes, a large one after it has written and before it publishes.
-module(erllama_cache_hooked_host).
-behaviour(erllama_cache_host).

-export([with_hook/2, hold_turns/0, give_back/1]).
-export([identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).

%% Runs `Fun' while every save that asks runs `Hook' first, in its own process.
-spec with_hook(fun(() -> term()), fun(() -> Result)) -> Result.
with_hook(Hook, Fun) ->
    persistent_term:put(?MODULE, Hook),
    try
        Fun()
    after
        persistent_term:erase(?MODULE)
    end.

%% Takes all turns on the dirty schedulers: no slice of a large save or load runs when this returns,
%% and none begins until they are given back.
-spec hold_turns() -> erllama_cache_nif:guard().
hold_turns() ->
    Guard = erllama_cache_nif:guard_new(persistent_term:get(erllama_cache_turn)),
    Turns = max(1, erlang:system_info(dirty_io_schedulers) - 2),
    Ref = make_ref(),
    case erllama_cache_nif:acquire_or_queue(Guard, Turns, 0, Ref) of
        ok -> Guard;
        queued -> receive {Ref, granted} -> Guard end
    end.

-spec give_back(erllama_cache_nif:guard()) -> ok.
give_back(Guard) ->
    _ = erllama_cache_nif:release(Guard),
    ok.

identify(Meta) ->
    erllama_cache_store:identify(Meta).

reserve(Name, Tier, Key, Size) ->
    erllama_cache_store:reserve(Name, Tier, Key, Size).

root(Name) ->
    erllama_cache_store:root(Name).

check(Name, Key, Token) ->
    Hook = persistent_term:get(?MODULE, fun() -> ok end),
    _ = Hook(),
    erllama_cache_store:check(Name, Key, Token).

mark_published(Name, Key, Token, Root) ->
    erllama_cache_store:mark_published(Name, Key, Token, Root).

announce(Name, Key, Token, Size, Header, Tokens) ->
    erllama_cache_store:announce(Name, Key, Token, Size, Header, Tokens).

cancel(Name, Key, Token) ->
    erllama_cache_store:cancel(Name, Key, Token).

count(Name, Event) ->
    erllama_cache_store:count(Name, Event).
