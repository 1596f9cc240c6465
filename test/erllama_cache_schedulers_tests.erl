%% No normal scheduler is held for a millisecond, whatever the size: of a prompt, of a payload whose
%% save is killed, of the semaphore's lists, of a store.
%%
%% In a VM with one normal scheduler another process wants to run all the time, and looks at the
%% clock each time it does: whoever holds the scheduler is seen in its gaps. The system may have
%% stopped the scheduler's thread meanwhile, as a busy machine does; so the VM is one that nobody
%% else on the machine stops, where that is allowed (as root), and each case is tried again until it
%% once goes without. What holds a scheduler by its own doing never does.
-module(erllama_cache_schedulers_tests).

-include_lib("eunit/include/eunit.hrl").

-export([play/1]).

-import(erllama_cache_test_util, [
    meta/0, meta/1, actor/0, actor/1, ask/2, kill/1, eventually/1, run_node/3
]).

-define(WRITER, erllama_cache_writer).
-define(STORE, schedulers_store).
-define(HOST, erllama_cache_hooked_host).
%% Microseconds.
-define(HELD, 1000).
%% Milliseconds.
-define(PATIENCE, 15000).
-define(MIB, (1 bsl 20)).
-define(TOKENS, 4000000).
-define(CROWD, 3000).
-define(MANY, 100000).

schedulers_test_() ->
    [{atom_to_list(Name), {timeout, 60, fun() -> in_its_own_node(Name) end}}
     || {Name, _} <- tests()].

in_its_own_node(Name) ->
    Limits = "chrt --fifo --pid 1 $$ 2>/dev/null; export ERL_FLAGS=\"+S 1:1\";",
    ?assertEqual({0, ""}, run_node(Limits, {?MODULE, play}, [atom_to_list(Name)])).

play([Name]) ->
    Test = proplists:get_value(list_to_existing_atom(Name), tests()),
    Begun = setup(),
    Status =
        try
            Test(),
            0
        catch
            Class:Reason:Stack -> io:format("~p~n", [{Class, Reason, Stack}]), 1
        after
            teardown(Begun)
        end,
    halt(Status).

tests() ->
    [
        {a_save_with_a_long_prompt, fun a_save_with_a_long_prompt/0},
        {a_load_of_a_long_prompt, fun a_load_of_a_long_prompt/0},
        {a_key_of_a_long_prompt, fun a_key_of_a_long_prompt/0},
        {a_longest_prefix_among_few_lengths, fun a_longest_prefix_among_few_lengths/0},
        {a_longest_prefix_among_many_lengths, fun a_longest_prefix_among_many_lengths/0},
        {invalid_tokens, fun invalid_tokens/0},
        {large_saves_that_are_killed, fun large_saves_that_are_killed/0},
        {large_loads_that_are_killed, fun large_loads_that_are_killed/0},
        {many_waiters, fun many_waiters/0},
        {many_slots_that_are_held, fun many_slots_that_are_held/0},
        {many_waiters_that_are_refused, fun many_waiters_that_are_refused/0},
        {many_holders_that_die, fun many_holders_that_die/0},
        {a_store_of_many_files, fun a_store_of_many_files/0}
    ].

setup() ->
    %% In memory, where a small save runs on the scheduler of its caller.
    Parent = case file:read_file_info("/dev/shm") of
        {ok, _} -> "/dev/shm";
        {error, _} -> "/tmp"
    end,
    Name = lists:concat(["schedulers.", os:getpid(), ".", erlang:unique_integer([positive])]),
    Root = filename:join(Parent, Name),
    ok = file:make_dir(Root),
    {ok, Writer} = ?WRITER:start_link(#{host => ?HOST, max_concurrent => 4}),
    {ok, Store} = erllama_cache_store:start_link(?STORE, #{root => Root, tier => ram_file}),
    {Root, [Writer, Store]}.

teardown({Root, Servers}) ->
    lists:foreach(fun gen_server:stop/1, lists:reverse(Servers)),
    ok = file:del_dir_r(Root).

%%% Large ones

a_save_with_a_long_prompt() ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS)) end),
    never_held(fun() ->
        {ok, Key} = ask(Prompt, fun() ->
            ?WRITER:save(?STORE, ram_file, meta(get(tokens)), <<"payload">>)
        end),
        ok = erllama_cache_store:delete(?STORE, Key)
    end).

a_load_of_a_long_prompt() ->
    {ok, Key} = ?WRITER:save(?STORE, ram_file, meta(lists:seq(1, ?TOKENS)), <<"payload">>),
    never_held(fun() ->
        {ok, _, <<"payload">>} = ask(actor(), fun() -> erllama_cache_store:load(?STORE, Key) end)
    end).

a_key_of_a_long_prompt() ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS)) end),
    never_held(fun() ->
        {ok, _} = ask(Prompt, fun() -> erllama_cache_store:key(meta(get(tokens))) end)
    end).

%% As much as is hashed on a normal scheduler, and more.
a_longest_prefix_among_few_lengths() ->
    Lengths = [1, 2000, 8000, 8100, 8190, 30000, 32768, ?TOKENS],
    ok = store_lengths(Lengths),
    [
        begin
            Prompt = actor(),
            ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, Length)) end),
            never_held(fun() -> miss = ask(Prompt, fun longest_prefix/0) end)
        end
     || Length <- Lengths
    ].

a_longest_prefix_among_many_lengths() ->
    ok = store_lengths(lists:seq(1, ?MANY)),
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS)) end),
    never_held(fun() -> miss = ask(Prompt, fun longest_prefix/0) end).

longest_prefix() ->
    erllama_cache_store:longest_prefix(?STORE, meta(get(tokens))).

%% Rows of files that have these lengths, and other tokens.
store_lengths(Lengths) ->
    lists:foreach(fun(Length) ->
        Row = erllama_cache_index:file(rand:bytes(32), {tokens, Length}, 1, 0, make_ref()),
        true = erllama_cache_index:add(?STORE, Row)
    end, Lengths).

%% Only the last one is.
invalid_tokens() ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS) ++ [none]) end),
    never_held(fun() ->
        {error, {invalid_meta, tokens}} = ask(Prompt, fun() ->
            ?WRITER:save(?STORE, ram_file, meta(get(tokens)), <<"payload">>)
        end)
    end).

%% Each when it has written all, and not yet published it.
large_saves_that_are_killed() ->
    Payload = binary:copy(<<"payload.">>, 16 * ?MIB),
    Self = self(),
    Stop = fun() -> Self ! {written, self()}, receive never -> ok end end,
    ?HOST:with_hook(Stop, fun() ->
        never_held(fun() ->
            #{tmp := Tmps} = erllama_cache_nif:live_objects(),
            Pid = spawn(fun() -> ?WRITER:save(?STORE, ram_file, meta(), Payload) end),
            receive {written, Pid} -> ok end,
            ok = kill(Pid),
            eventually(fun() -> map_get(tmp, erllama_cache_nif:live_objects()) =< Tmps end)
        end)
    end).

%% Each when it has loaded a part.
large_loads_that_are_killed() ->
    {ok, Key} = ?WRITER:save(?STORE, ram_file, meta(), binary:copy(<<"payload.">>, 16 * ?MIB)),
    Self = self(),
    never_held(fun() ->
        Turns = ?HOST:stop_after_first_slice(fun() ->
            Pid = spawn(fun() -> erllama_cache_store:load(?STORE, Key) end),
            Self ! {begun, Pid},
            Pid
        end),
        receive {begun, Pid} -> ok = kill(Pid) end,
        ok = ?HOST:go_on(Turns),
        eventually(fun() -> map_get(load, erllama_cache_nif:live_objects()) =:= 0 end)
    end).

%%% Many

many_waiters() ->
    ok = ?WRITER:acquire(0, #{weight => 4}),
    Crowd = crowd(?MANY, fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> map_get(waiting, ?WRITER:info()) =:= ?MANY end),
    never_held(fun() -> ?MANY = ask(roomy(), fun() -> length(?WRITER:waiters()) end) end),
    never_held(fun() -> ok = ?WRITER:set_max_inflight_bytes(infinity) end),
    disperse(Crowd),
    ok = ?WRITER:release().

many_slots_that_are_held() ->
    ok = ?WRITER:set_max_concurrent(?MANY),
    [ok = ?WRITER:acquire(0) || _ <- lists:seq(1, ?MANY)],
    never_held(fun() -> ?MANY = ask(roomy(), fun() -> length(?WRITER:holders()) end) end),
    [ok = ?WRITER:release() || _ <- lists:seq(1, ?MANY)].

%% A limit that none of them fits under refuses them all at once.
many_waiters_that_are_refused() ->
    Self = self(),
    Queue = fun() ->
        ok = ?WRITER:set_max_concurrent(4),
        ok = ?WRITER:acquire(0, #{weight => 4}),
        Crowd = crowd(?CROWD, fun() ->
            Self ! {self(), ?WRITER:acquire(infinity, #{weight => 2})}
        end),
        eventually(fun() -> map_get(waiting, ?WRITER:info()) =:= ?CROWD end),
        Crowd
    end,
    Refuse = fun(_Crowd) -> ok = ?WRITER:set_max_concurrent(1) end,
    never_held(Queue, Refuse, fun(Crowd) ->
        Refused = {error, weight_exceeds_limit},
        [receive {Pid, Answer} -> Refused = Answer end || {Pid, _} <- Crowd],
        disperse(Crowd),
        ok = ?WRITER:release()
    end).

%% Whose slots all go to the one that waits for as many.
many_holders_that_die() ->
    Take = fun() ->
        ok = ?WRITER:set_max_concurrent(?CROWD),
        Crowd = crowd(?CROWD, fun() -> ?WRITER:acquire(infinity) end),
        eventually(fun() -> ?WRITER:current() =:= ?CROWD end),
        Crowd
    end,
    Die = fun(Crowd) ->
        [true = exit(Pid, kill) andalso erlang:yield() || {Pid, _} <- Crowd],
        ok = ?WRITER:acquire(infinity, #{weight => ?CROWD})
    end,
    never_held(Take, Die, fun(Crowd) ->
        ok = ?WRITER:release(),
        disperse(Crowd)
    end).

%% Has room for a long list: how long it takes to collect is its own affair.
roomy() ->
    actor([{min_heap_size, 40 * ?MANY}]).

%% Processes that do as told and then live on.
crowd(Size, Fun) ->
    [
        spawn_monitor(fun() ->
            _ = Fun(),
            receive disperse -> ok end
        end)
     || _ <- lists:seq(1, Size)
    ].

disperse(Crowd) ->
    [true = exit(Pid, kill) || {Pid, _} <- Crowd],
    [receive {'DOWN', Monitor, process, Pid, _} -> ok end || {Pid, Monitor} <- Crowd].

a_store_of_many_files() ->
    [{ok, _} = ?WRITER:save(?STORE, ram_file, meta([N]), <<N:64>>) || N <- lists:seq(1, ?CROWD)],
    never_held(fun() ->
        #{files := ?CROWD} = erllama_cache_store:info(?STORE)
    end).

%%% Watching

%% Among what is old on the process's heap, which a minor collection leaves alone.
keep(Name, Value) ->
    _ = put(Name, Value),
    [true = garbage_collect() || _ <- [1, 2]],
    ok.

never_held(Fun) ->
    never_held(fun() -> none end, fun(none) -> Fun() end, fun(none) -> ok end).

%% It is `Fun' that is watched.
never_held(Before, Fun, After) ->
    never_held(Before, Fun, After, erlang:monotonic_time(millisecond) + ?PATIENCE).

never_held(Before, Fun, After, Deadline) ->
    Made = Before(),
    Held = held(fun() -> Fun(Made) end),
    _ = After(Made),
    InTime = erlang:monotonic_time(millisecond) < Deadline,
    case Held of
        no -> ok;
        _ when InTime -> never_held(Before, Fun, After, Deadline);
        _ -> error({held, Held})
    end.

%% For how long at most somebody else had the scheduler, if that was too long.
held(Fun) ->
    Self = self(),
    Ticker = spawn_link(fun() -> tick(Self, erlang:monotonic_time(microsecond), 0) end),
    _ = Fun(),
    Ticker ! stop,
    receive
        {Ticker, Longest} when Longest > ?HELD -> {microseconds, Longest};
        {Ticker, _} -> no
    end.

tick(To, Before, Longest) ->
    true = erlang:yield(),
    Now = erlang:monotonic_time(microsecond),
    receive
        stop -> To ! {self(), max(Longest, Now - Before)}
    after 0 ->
        tick(To, Now, max(Longest, Now - Before))
    end.
