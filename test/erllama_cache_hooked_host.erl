%% The store as a host, with something that happens when a save asks whether its reservation stands:
%% a small save before it writes, a large one after it has written and before it publishes.
-module(erllama_cache_hooked_host).
-behaviour(erllama_cache_host).

-export([with_hook/2, stop_after_first_slice/1, go_on/1]).
-export_type([turns/0]).
-export([identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).

-opaque turns() :: {erllama_cache_nif:guard(), {reference(), ok | queued}}.

%% Runs `Fun' while every save that asks runs `Hook' first, in its own process.
-spec with_hook(fun(() -> term()), fun(() -> Result)) -> Result.
with_hook(Hook, Fun) ->
    persistent_term:put(?MODULE, Hook),
    try
        Fun()
    after
        persistent_term:erase(?MODULE)
    end.

%% Begins a large save or load in a process of its own, which is stopped after its first slice: all
%% turns on the dirty schedulers are taken, and until go_on/1 no slice of anything runs.
-spec stop_after_first_slice(fun(() -> pid())) -> turns().
stop_after_first_slice(Begin) ->
    First = all_turns(),
    ok = taken(First),
    waits_for_a_turn(Begin()),
    %% Turns are given in the order in which they were asked for: one to that process, then all.
    Second = all_turns(),
    ok = go_on(First),
    ok = taken(Second),
    Second.

-spec go_on(turns()) -> ok.
go_on({Guard, _}) ->
    _ = erllama_cache_nif:release(Guard),
    ok.

all_turns() ->
    Guard = erllama_cache_nif:guard_new(persistent_term:get(erllama_cache_turn)),
    Turns = max(1, erlang:system_info(dirty_io_schedulers) - 2),
    Ref = make_ref(),
    {Guard, {Ref, erllama_cache_nif:acquire_or_queue(Guard, Turns, 0, Ref)}}.

taken({_Guard, {_Ref, ok}}) -> ok;
taken({_Guard, {Ref, queued}}) -> receive {Ref, granted} -> ok end.

waits_for_a_turn(Pid) ->
    Waits = [{current_function, {erllama_cache_turn, take, 1}}, {status, waiting}],
    erllama_cache_test_util:eventually(fun() ->
        process_info(Pid, [current_function, status]) =:= Waits
    end).

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
