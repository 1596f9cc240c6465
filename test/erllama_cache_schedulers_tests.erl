%% No normal scheduler is held for a millisecond, whatever the size: of a prompt, of a payload whose
%% save is killed, of the semaphore's lists, of a store.
%%
%% The VM itself says when one was (system_monitor/2). The system may have stopped its thread
%% meanwhile, and a machine that is busy does; so each case is tried again until it once goes
%% without. What holds a scheduler by its own doing never does.
-module(erllama_cache_schedulers_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [meta/0, meta/1, actor/0, ask/2, eventually/1]).

-define(WRITER, erllama_cache_writer).
-define(STORE, schedulers_store).
-define(HOST, erllama_cache_hooked_host).
-define(ATTEMPTS, 40).
%% Milliseconds.
-define(HELD, 1).
-define(MIB, (1 bsl 20)).
-define(TOKENS, 4000000).
-define(CROWD, 3000).

schedulers_test_() ->
    {foreach, fun setup/0, fun teardown/1, [
        fun(Root) -> {atom_to_list(Name), {timeout, 120, fun() -> Test(Root) end}} end
     || {Name, Test} <- tests()
    ]}.

tests() ->
    [
        {a_save_with_a_long_prompt, fun a_save_with_a_long_prompt/1},
        {a_load_of_a_long_prompt, fun a_load_of_a_long_prompt/1},
        {a_key_of_a_long_prompt, fun a_key_of_a_long_prompt/1},
        {tokens_that_are_none, fun tokens_that_are_none/1},
        {large_saves_that_are_killed, fun large_saves_that_are_killed/1},
        {large_loads_that_are_killed, fun large_loads_that_are_killed/1},
        {a_crowd_that_waits, fun a_crowd_that_waits/1},
        {a_crowd_that_is_refused, fun a_crowd_that_is_refused/1},
        {a_crowd_that_dies, fun a_crowd_that_dies/1},
        {a_store_of_many_files, fun a_store_of_many_files/1}
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

a_save_with_a_long_prompt(_) ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS)) end),
    never_held(fun() ->
        {ok, Key} = ask(Prompt, fun() ->
            ?WRITER:save(?STORE, ram_file, meta(get(tokens)), <<"payload">>)
        end),
        ok = erllama_cache_store:delete(?STORE, Key)
    end).

a_load_of_a_long_prompt(_) ->
    {ok, Key} = ?WRITER:save(?STORE, ram_file, meta(lists:seq(1, ?TOKENS)), <<"payload">>),
    never_held(fun() ->
        {ok, _, <<"payload">>} = ask(actor(), fun() -> erllama_cache_store:load(?STORE, Key) end)
    end).

a_key_of_a_long_prompt(_) ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS)) end),
    never_held(fun() ->
        {ok, _} = ask(Prompt, fun() -> erllama_cache_store:key(meta(get(tokens))) end)
    end).

%% Only the last one is.
tokens_that_are_none(_) ->
    Prompt = actor(),
    ok = ask(Prompt, fun() -> keep(tokens, lists:seq(1, ?TOKENS) ++ [none]) end),
    never_held(fun() ->
        {error, {invalid_meta, tokens}} = ask(Prompt, fun() ->
            ?WRITER:save(?STORE, ram_file, meta(get(tokens)), <<"payload">>)
        end)
    end).

%% Each with a file of its own behind it, and some of it written.
large_saves_that_are_killed(_) ->
    Payload = binary:copy(<<"payload.">>, 8 * ?MIB),
    killed_in_the_middle(fun() -> ?WRITER:save(?STORE, ram_file, meta(), Payload) end).

large_loads_that_are_killed(_) ->
    {ok, Key} = ?WRITER:save(?STORE, ram_file, meta(), binary:copy(<<"payload.">>, 8 * ?MIB)),
    killed_in_the_middle(fun() -> erllama_cache_store:load(?STORE, Key) end).

killed_in_the_middle(Fun) ->
    never_held(fun() ->
        #{tmp := Tmps, load := Loads} = erllama_cache_nif:live_objects(),
        Self = self(),
        Turns = ?HOST:stop_after_first_slice(fun() ->
            Pid = spawn(Fun),
            Self ! {begun, Pid},
            Pid
        end),
        receive {begun, Pid} -> erllama_cache_test_util:kill(Pid) end,
        ok = ?HOST:go_on(Turns),
        eventually(fun() ->
            #{tmp := NowTmps, load := NowLoads} = erllama_cache_nif:live_objects(),
            NowTmps =< Tmps andalso NowLoads =< Loads
        end)
    end).

%%% Many

a_crowd_that_waits(_) ->
    ok = ?WRITER:acquire(0, #{weight => 4}),
    Crowd = crowd(fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= ?CROWD end),
    never_held(fun() ->
        ?CROWD = length(?WRITER:waiters()),
        #{waiting := ?CROWD} = ?WRITER:info(),
        ok = ?WRITER:set_max_inflight_bytes(infinity)
    end),
    disperse(Crowd),
    ok = ?WRITER:release().

%% A limit for all of them lets them in at once, and one that none fits under refuses them.
a_crowd_that_is_refused(_) ->
    never_held(fun() ->
        ok = ?WRITER:set_max_concurrent(4),
        ok = ?WRITER:acquire(0, #{weight => 4}),
        Self = self(),
        Crowd = crowd(fun() -> Self ! {self(), ?WRITER:acquire(infinity, #{weight => 2})} end),
        eventually(fun() -> length(?WRITER:waiters()) =:= ?CROWD end),
        ok = ?WRITER:set_max_concurrent(1),
        Refused = {error, weight_exceeds_limit},
        [receive {Pid, Answer} -> Refused = Answer end || {Pid, _} <- Crowd],
        disperse(Crowd),
        ok = ?WRITER:release()
    end),
    ok = ?WRITER:set_max_concurrent(4).

a_crowd_that_dies(_) ->
    never_held(fun() ->
        ok = ?WRITER:set_max_concurrent(2 * ?CROWD),
        Crowd = crowd(fun() -> ?WRITER:acquire(infinity) end),
        eventually(fun() -> length(?WRITER:holders()) =:= ?CROWD end),
        disperse(Crowd),
        eventually(fun() -> ?WRITER:holders() =:= [] end)
    end),
    ok = ?WRITER:set_max_concurrent(4).

%% Processes that do as told and then live on.
crowd(Fun) ->
    [
        spawn_monitor(fun() ->
            _ = Fun(),
            receive disperse -> ok end
        end)
     || _ <- lists:seq(1, ?CROWD)
    ].

disperse(Crowd) ->
    [true = exit(Pid, kill) || {Pid, _} <- Crowd],
    [receive {'DOWN', Monitor, process, Pid, _} -> ok end || {Pid, Monitor} <- Crowd].

a_store_of_many_files(_) ->
    [{ok, _} = ?WRITER:save(?STORE, ram_file, meta([N]), <<N:64>>) || N <- lists:seq(1, ?CROWD)],
    never_held(fun() ->
        #{files := ?CROWD} = erllama_cache_store:info(?STORE)
    end).

%%% Watching

keep(Name, Value) ->
    _ = put(Name, Value),
    ok.

never_held(Fun) ->
    never_held(Fun, ?ATTEMPTS).

never_held(Fun, Attempts) ->
    case held(Fun) of
        [] -> ok;
        _ when Attempts > 1 -> never_held(Fun, Attempts - 1);
        Held -> error({held, Held})
    end.

%% Who held a scheduler while `Fun' ran, but for those who collected garbage: how much of that there
%% is, is theirs.
held(Fun) ->
    Watcher = spawn_link(fun() -> watch([], []) end),
    Before = erlang:system_monitor(Watcher, [{long_schedule, ?HELD}, {long_gc, ?HELD}]),
    try
        Fun()
    after
        _ = erlang:system_monitor(Before)
    end,
    Ref = make_ref(),
    Watcher ! {tell, self(), Ref},
    receive {Ref, Held} -> Held end.

watch(Held, Collected) ->
    receive
        {monitor, Pid, long_schedule, How} when is_pid(Pid) -> watch([{Pid, How} | Held], Collected);
        {monitor, _Port, long_schedule, _} -> watch(Held, Collected);
        {monitor, Pid, long_gc, _} -> watch(Held, [Pid | Collected]);
        {tell, To, Ref} -> To ! {Ref, [Who || {Pid, _} = Who <- Held, not lists:member(Pid, Collected)]}
    end.
