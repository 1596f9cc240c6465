%% The store as a host, with something that happens when a save asks whether its reservation stands:
%% a small save before it writes, a large one after it has written and before it publishes; or at
%% each call that is about the reservation.
-module(erllama_cache_hooked_host).
-behaviour(erllama_cache_host).

-export([with_hook/2, make_keys_of/1]).
-export([stop_after_first_slice/1, hold_turns/0, next_turn/1, go_on/1, waits_for_a_turn/1]).
-export([all_turns/0, taken/1]).
-export_type([turns/0, hook/0, call/0]).
-export([keyed_by/0, identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3,
         count/2]).

-opaque turns() :: {erllama_cache_nif:guard(), {reference(), ok | queued}}.

%% Without arguments, it runs before `check'. With the call, the key and the token, it runs before
%% `check', `mark_published' and `announce', and right after a `reserve' that has gone well.
-type hook() ::
    fun(() -> term())
    | fun((call(), Key :: binary(), erllama_cache_host:token()) -> term()).
-type call() :: reserve | check | mark_published | announce.

%% Runs `Fun' while every save runs `Hook' in its own process.
-spec with_hook(hook(), fun(() -> Result)) -> Result.
with_hook(Hook, Fun) ->
    persistent_term:put(?MODULE, Hook),
    try
        Fun()
    after
        persistent_term:erase(?MODULE)
    end.

%% What it makes keys of, in writers that are started from now on.
-spec make_keys_of(erllama_cache_host:keyed_by()) -> ok.
make_keys_of(KeyedBy) ->
    persistent_term:put({?MODULE, keyed_by}, KeyedBy).

%% Begins a large save or load in a process of its own, which is stopped after its first slice: all
%% turns on the dirty schedulers are taken, and until go_on/1 no slice of anything runs.
-spec stop_after_first_slice(fun(() -> pid())) -> turns().
stop_after_first_slice(Begin) ->
    Turns = hold_turns(),
    ok = waits_for_a_turn(Begin()),
    next_turn(Turns).

%% Takes all turns on the dirty schedulers.
-spec hold_turns() -> turns().
hold_turns() ->
    Turns = all_turns(),
    ok = taken(Turns),
    Turns.

%% Gives a turn to each who waits for one, and takes them all again.
-spec next_turn(turns()) -> turns().
next_turn(Turns) ->
    %% They are given in the order in which they were asked for.
    Next = all_turns(),
    ok = go_on(Turns),
    ok = taken(Next),
    Next.

-spec go_on(turns()) -> ok.
go_on({Guard, _}) ->
    _ = erllama_cache_nif:release(Guard),
    ok.

%% Asks for all turns, behind those who have asked already: see taken/1.
-spec all_turns() -> turns().
all_turns() ->
    Guard = erllama_cache_nif:guard_new(persistent_term:get(erllama_cache_io_limit)),
    Turns = max(1, erlang:system_info(dirty_io_schedulers) - 2),
    Ref = make_ref(),
    {Guard, {Ref, erllama_cache_nif:acquire_or_queue(Guard, Turns, 0, Ref)}}.

%% Waits for the turns. From then on nothing that needs one goes on until go_on/1.
-spec taken(turns()) -> ok.
taken({_Guard, {_Ref, ok}}) -> ok;
taken({_Guard, {Ref, queued}}) -> receive {Ref, granted} -> ok end.

%% Returns when this process waits for its turn.
-spec waits_for_a_turn(pid()) -> ok.
waits_for_a_turn(Pid) ->
    erllama_cache_test_util:eventually(fun() ->
        case process_info(Pid, [status, current_stacktrace]) of
            [{status, waiting}, {current_stacktrace, [Waits, Asks | _]}] ->
                {element(1, Waits), element(1, Asks)} =:=
                    {erllama_cache_waiter, erllama_cache_io_limit};
            _ ->
                false
        end
    end).

keyed_by() ->
    {ok, persistent_term:get({?MODULE, keyed_by}, tokens)}.

identify(KeyedBy, Meta) ->
    erllama_cache_store:identify(KeyedBy, Meta).

reserve(Name, Tier, Key, Size) ->
    case erllama_cache_store:reserve(Name, Tier, Key, Size) of
        {ok, Token} ->
            ok = hook(reserve, Key, Token),
            {ok, Token};
        {error, _} = Error ->
            Error
    end.

root(Name) ->
    erllama_cache_store:root(Name).

check(Name, Key, Token) ->
    ok = hook(check, Key, Token),
    erllama_cache_store:check(Name, Key, Token).

mark_published(Name, Key, Token, Root) ->
    ok = hook(mark_published, Key, Token),
    erllama_cache_store:mark_published(Name, Key, Token, Root).

announce(Name, Key, Token, Size, Header, Tokens) ->
    ok = hook(announce, Key, Token),
    erllama_cache_store:announce(Name, Key, Token, Size, Header, Tokens).

cancel(Name, Key, Token) ->
    erllama_cache_store:cancel(Name, Key, Token).

count(Name, Event) ->
    erllama_cache_store:count(Name, Event).

hook(Call, Key, Token) ->
    _ = case persistent_term:get(?MODULE, none) of
        Hook when is_function(Hook, 3) -> Hook(Call, Key, Token);
        Hook when is_function(Hook, 0), Call =:= check -> Hook();
        _ -> ok
    end,
    ok.
