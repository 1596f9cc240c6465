%% Two nodes that save into one root on a distributed file system, while parts of that fail. run.sh
%% makes the volume, runs this, and does on its behalf what is done to the volume.
-module(erllama_cache_cluster).

-export([main/0, save_list/3, restart_for_ever/3, turns/3]).

-import(erllama_cache_test_util, [run_command/2]).

-define(STORE, cluster_store).
-define(SECOND, second_store).
-define(WRITER, erllama_cache_writer).
-define(SAVERS, 4).

-record(state, {
    script :: string(),
    work :: string(),
    keyed_by :: tokens | text,
    nodes = #{} :: #{a | b => erllama_cache_nodes_util:started()},
    next = 1 :: pos_integer(),
    %% Which payload a key that was acknowledged has: whose is seen when it is loaded first.
    acknowledged = #{} :: #{pos_integer() => unknown | a | b},
    rows = [] :: [{atom(), [integer()]}]
}).

-spec main() -> no_return().
main() ->
    [Script, Work, KeyedBy] = init:get_plain_arguments(),
    try
        S0 = #state{script = Script, work = Work, keyed_by = list_to_existing_atom(KeyedBy)},
        S1 = start(b, start(a, S0)),
        S = lists:foldl(fun scenario/2, S1, [start, replica, client, node, full]),
        Files = judged(S),
        print(S, Files),
        ok = speed(S),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("FAILED~n~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

start(Id, #state{work = Work, keyed_by = KeyedBy, nodes = Nodes} = S) ->
    {_, Node} = Started = erllama_cache_nodes_util:start(),
    ok = erpc:call(Node, logger, set_primary_config, [level, error]),
    Options = #{root => filename:join(Work, atom_to_list(Id)), keyed_by => KeyedBy},
    ok = erllama_cache_nodes_util:start_store(Node, ?STORE, Options),
    Writer = #{host => erllama_cache_store, max_concurrent => ?SAVERS},
    {ok, _} = erllama_cache_nodes_util:unlinked(Node, ?WRITER, start_link, [Writer]),
    S#state{nodes = Nodes#{Id => Started}}.

node_of(Id, #state{nodes = Nodes}) ->
    #{Id := {_, Node}} = Nodes,
    Node.

act(Words, #state{script = Script}) ->
    {0, Output} = run_command(Script, ["act" | Words]),
    Output.

%%% Scenarios

scenario(Name, S0) ->
    Begun = erlang:monotonic_time(millisecond),
    {Results, S1} = run(Name, S0),
    Acknowledged = lists:usort([N || {N, ok} <- Results]),
    Known = maps:from_list([{N, unknown} || N <- Acknowledged]),
    Cut = lists:usort([N || {N, _} <- Results]) -- Acknowledged,
    {Whole, S2} = verify(Cut, S1#state{acknowledged = maps:merge(Known, S1#state.acknowledged)}),
    Took = (erlang:monotonic_time(millisecond) - Begun) div 1000,
    Row = {Name, [length(Results), length(Acknowledged), length(Cut), Whole, Took]},
    S2#state{rows = S2#state.rows ++ [Row]}.

%% What was tried, each with `ok' if it was acknowledged.
run(start, S0) ->
    {Loop, Monitor} = spawn_monitor(node_of(b, S0), ?MODULE, restart_for_ever,
                                    [?SECOND, root(b, S0), S0#state.keyed_by]),
    {Saving, S1} = save(S0),
    Results = results(Saving),
    Loop ! {stop, self()},
    receive
        {Loop, Restarts} when Restarts > 0 -> {fine(Results), S1};
        {'DOWN', Monitor, process, Loop, Reason} -> error({store_on_other_mount, Reason})
    end;
run(replica, S0) ->
    {First, S1} = save(S0),
    _ = act(["kill_replica", "2"], S1),
    InFirst = results(First),
    {Second, S2} = save(S1),
    InSecond = results(Second),
    %% The replica comes back in the middle of these.
    {Third, S3} = save(S2),
    _ = act(["start_replica", "2"], S3),
    InThird = results(Third),
    _ = act(["heal", "all"], S3),
    {fine(InFirst ++ InSecond ++ InThird), S3};
run(client, S0) ->
    {Saving, S1} = save(S0),
    _ = act(["kill_client", "b"], S1),
    Results = results(Saving),
    _ = act(["mount_again", "b"], S1),
    %% The store notices by itself that its root is another directory.
    {Again, S2} = save(S1),
    Afterwards = fine(results(Again)),
    [] = [Failed || {a, _, {error, _}} = Failed <- Results, not is_fine(Failed)],
    {told(Results) ++ Afterwards, restart_store(b, S2)};
run(node, #state{nodes = Nodes} = S0) ->
    {Saving, S1} = save(S0),
    #{b := {_, Node}} = Nodes,
    Pid = erpc:call(Node, os, getpid, []),
    _ = os:cmd("kill -9 " ++ Pid),
    Results = results(Saving),
    S2 = start(b, S1),
    {Again, S3} = save(S2),
    {told(Results) ++ fine(results(Again)), S3};
run(full, S0) ->
    _ = act(["fill", "now"], S0),
    {Results, S1} = save_until_full([], 200, S0),
    _ = act(["make_room", "now"], S1),
    {Again, S2} = save(S1),
    {told(Results) ++ fine(results(Again)), S2}.

%% The volume notices after a while that it is full.
save_until_full(Sofar, Tries, S0) when Tries > 0 ->
    {Saving, S1} = save(S0),
    Results = results(Saving) ++ Sofar,
    case [N || {_, N, {error, enospc}} <- Results] of
        [] -> save_until_full(Results, Tries - 1, S1);
        _ -> {Results, S1}
    end.

root(Id, #state{work = Work}) ->
    filename:join(Work, atom_to_list(Id)).

%% Its start sweeps what saves that were cut off have left.
restart_store(Id, S) ->
    Node = node_of(Id, S),
    ok = erpc:call(Node, gen_server, stop, [?STORE]),
    Options = #{root => root(Id, S), keyed_by => S#state.keyed_by},
    ok = erllama_cache_nodes_util:start_store(Node, ?STORE, Options),
    S.

%% Runs on a node: a store on a root where others save.
restart_for_ever(Name, Root, KeyedBy) ->
    process_flag(trap_exit, true),
    restart(Name, #{root => Root, keyed_by => KeyedBy}, 0).

restart(Name, Options, N) ->
    {ok, Pid} = erllama_cache_store:start_link(Name, Options),
    ok = gen_server:stop(Pid),
    receive
        {stop, From} -> From ! {self(), N + 1}
    after 0 ->
        restart(Name, Options, N + 1)
    end.

%%% Saving

%% On both nodes: the same keys, and as many of each one's own.
save(#state{next = Next} = S) ->
    Keys = keys(),
    Shared = lists:seq(Next, Next + Keys div 2 - 1),
    Own = #{
        a => lists:seq(Next + Keys div 2, Next + Keys - 1),
        b => lists:seq(Next + Keys, Next + Keys + Keys div 2 - 1)
    },
    Savers = [
        {Id, Share, spawn_monitor(node_of(Id, S), ?MODULE, save_list, [self(), Id, Share])}
     || Id <- [a, b], Share <- shares(Shared ++ map_get(Id, Own))
    ],
    {Savers, S#state{next = Next + 2 * Keys}}.

keys() ->
    list_to_integer(os:getenv("CLUSTER_KEYS", "40")).

shares(Keys) ->
    [[N || N <- Keys, N rem ?SAVERS =:= Share] || Share <- lists:seq(0, ?SAVERS - 1)].

%% Runs on a node.
save_list(Controller, Id, Numbers) ->
    [
        Controller ! {self(), N, ?WRITER:save(?STORE, disk, meta(N), payload(Id, N), 60000)}
     || N <- Numbers
    ].

%% Whose save of which key ended how; `cut' where nobody was told.
results(Savers) ->
    lists:append([
        [{Id, N, Result} || {N, Result} <- maps:to_list(told_by(Pid, Monitor, none(Numbers)))]
     || {Id, Numbers, {Pid, Monitor}} <- Savers
    ]).

none(Numbers) ->
    maps:from_list([{N, cut} || N <- Numbers]).

told_by(Pid, Monitor, Told) ->
    receive
        {Pid, N, Result} -> told_by(Pid, Monitor, Told#{N := Result});
        {'DOWN', Monitor, process, Pid, _Reason} -> Told
    end.

told(Results) ->
    [{N, case is_fine(Each) of true -> ok; false -> cut end} || {_, N, _} = Each <- Results].

%% Where nothing may have failed.
fine(Results) ->
    case [Each || Each <- Results, not is_fine(Each)] of
        [] -> told(Results);
        Failed -> error({failed, Failed})
    end.

%% One of the two is enough: the other may still be at it.
is_fine({_Id, _N, {ok, _Key}}) -> true;
is_fine({_Id, _N, {error, already_present}}) -> true;
is_fine({_Id, _N, _}) -> false.

meta(N) ->
    Meta = erllama_cache_test_util:meta([N]),
    Meta#{prompt_text => integer_to_binary(N)}.

%% Most are 60 to 240 KiB, some 2 MiB.
payload(Id, N) ->
    Size = case N rem 8 of
        0 -> 33;
        Other -> 1 + Other rem 4
    end,
    binary:copy(<<(atom_to_binary(Id))/binary, N:56>>, 7680 * Size).

%%% Looking

%% Both nodes have each acknowledged key, with one payload; of the others, how many are there.
verify(Cut, #state{acknowledged = Acknowledged} = S) ->
    Seen = maps:map(fun(N, Whose) -> seen(N, Whose, S) end, Acknowledged),
    Whole = [N || N <- Cut, Loaded <- [both(N, S)], Loaded =/= miss],
    {length(Whole), S#state{
        acknowledged = maps:merge(Seen, maps:from_list([{N, both(N, S)} || N <- Whole]))
    }}.

seen(N, Whose, S) ->
    case both(N, S) of
        miss -> error({lost, N});
        Id when Whose =:= unknown; Whose =:= Id -> Id;
        Id -> error({changed, N, Whose, Id})
    end.

both(N, S) ->
    [InA, InB] = [whose(N, load(node_of(Id, S), N, S)) || Id <- [a, b]],
    case InA of
        InB -> InA;
        _ -> error({differ, N, InA, InB})
    end.

load(Node, N, #state{keyed_by = KeyedBy}) ->
    {ok, Key} = erllama_cache_store:key(meta(N), #{keyed_by => KeyedBy}),
    erpc:call(Node, erllama_cache_store, load, [?STORE, Key]).

whose(_N, miss) ->
    miss;
whose(N, {ok, _Info, Payload}) ->
    case [Id || Id <- [a, b], payload(Id, N) =:= Payload] of
        [Id] -> Id;
        [] -> error({wrong, N})
    end;
whose(N, {error, Reason}) ->
    error({cannot_load, N, Reason}).

%% How many files the oracle has found good on each replica.
judged(S) ->
    _ = act(["heal", "all"], S),
    _ = restart_store(a, S),
    Files = list_to_integer(string:trim(act(["judge", "all"], S), both, ".\n")),
    Files = map_size(S#state.acknowledged).

print(#state{rows = Rows}, Files) ->
    io:format("~-8s ~8s ~8s ~8s ~8s ~8s~n", [while, saves, keys, cut_off, of_them, seconds]),
    io:format("~-8s ~8s ~8s ~8s ~8s ~8s~n", ["", "", stored, "", whole, ""]),
    [io:format("~-8s ~8b ~8b ~8b ~8b ~8b~n", [Name | Counts]) || {Name, Counts} <- Rows],
    io:format("~b files on each replica, all good; lost 0, wrong 0, left 0~n", [Files]).

%%% Speed

%% The save, the same bytes written bare with a sync and a rename, and dd, in turns: medians.
speed(S) ->
    case os:getenv("CLUSTER_SPEED") of
        "no" ->
            ok;
        _ ->
            io:format("~-8s ~10s ~10s ~10s ~8s~n", [size, floor_ms, save_ms, dd_ms, times]),
            lists:foreach(fun(MiB) -> speed(MiB, S) end, [1, 16, 64])
    end.

%% All on one node: a payload that comes from another would be measured, too.
speed(MiB, #state{work = Work} = S) ->
    Turns = erpc:call(node_of(a, S), ?MODULE, turns, [MiB, root(a, S), Work]),
    {Bares, Saves, Dds} = lists:unzip3(Turns),
    [Bare, Save, Dd] = [lists:nth(3, lists:sort(Times)) || Times <- [Bares, Saves, Dds]],
    io:format("~5b MiB ~10.1f ~10.1f ~10.1f ~8.2f~n", [MiB, Bare, Save, Dd, Save / Bare]).

turns(MiB, Root, Work) ->
    Payload = rand:bytes(MiB bsl 20),
    [
        begin
            Meta = meta(1000000 + MiB * 100 + N),
            Bare = timed(fun() -> bare(filename:join(Root, "bare"), Payload) end),
            Save = timed(fun() -> {ok, _} = ?WRITER:save(?STORE, disk, Meta, Payload) end),
            {Bare, Save, dd(MiB, filename:join(Root, "dd"), Work)}
        end
     || N <- lists:seq(1, 5)
    ].

bare(File, Payload) ->
    {ok, Device} = file:open(File ++ ".tmp", [write, raw]),
    pieces(Device, Payload),
    ok = file:datasync(Device),
    ok = file:close(Device),
    ok = file:rename(File ++ ".tmp", File),
    %% A save does not end before its name is safe, either.
    {ok, Named} = file:open(File, [read, write, raw]),
    ok = file:sync(Named),
    ok = file:close(Named),
    ok = file:delete(File).

pieces(Device, <<Piece:524288/binary, Rest/binary>>) ->
    ok = file:write(Device, Piece),
    pieces(Device, Rest);
pieces(Device, Rest) ->
    ok = file:write(Device, Rest).

dd(MiB, File, Work) ->
    {0, _} = run_command("dd", ["if=/dev/urandom", "of=" ++ filename:join(Work, "source"),
                                "bs=1M", "count=" ++ integer_to_list(MiB)]),
    Written = timed(fun() ->
        {0, _} = run_command("dd", ["if=" ++ filename:join(Work, "source"), "of=" ++ File,
                                    "bs=1M", "conv=fdatasync"])
    end),
    ok = file:delete(File),
    Written.

timed(Fun) ->
    Begun = erlang:monotonic_time(microsecond),
    _ = Fun(),
    (erlang:monotonic_time(microsecond) - Begun) / 1000.
