%% Stores of several nodes that lend each other their files.
-module(erllama_cache_peers_SUITE).

-include_lib("proper/include/proper.hrl").
-include_lib("stdlib/include/assert.hrl").
-include_lib("common_test/include/ct.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2]).
-export([a_load_takes_what_a_peer_has/1, of_every_size/1, nobody_is_asked_in_vain/1,
         the_longest_is_found_wherever_it_is/1, many_loads_share_one_fetch/1,
         a_bad_file_is_not_taken/1, the_next_peer_is_tried/1, only_a_secret_that_is_shared/1,
         an_evicted_file_still_arrives/1, a_lender_that_dies_costs_a_moment/1,
         a_partition_is_a_miss/1, a_ticket_is_good_for_one_connection/1,
         a_borrower_that_dies_leaves_nothing/1, no_room_is_a_miss/1,
         a_node_lends_so_many_at_a_time/1, a_scope_that_ends_is_joined_again/1,
         a_file_that_is_gone_is_a_miss/1, through_the_distribution_channel/1, who_holds_what/1,
         a_store_that_ends_is_no_store/1, whoever_is_killed_at_any_piece/1]).
-export([await_import/1, kill_borrower/1, kill_lenders/0, lenders/0]).

-import(erllama_cache_test_util, [file_of/2, eventually/1]).

-define(STORE, peers_store).
-define(GROUP, peers_group).
-define(WRITER, erllama_cache_writer).

all() ->
    [a_load_takes_what_a_peer_has, of_every_size, nobody_is_asked_in_vain,
     the_longest_is_found_wherever_it_is, many_loads_share_one_fetch, a_bad_file_is_not_taken,
     the_next_peer_is_tried, only_a_secret_that_is_shared, an_evicted_file_still_arrives,
     a_lender_that_dies_costs_a_moment, a_partition_is_a_miss,
     a_ticket_is_good_for_one_connection, a_borrower_that_dies_leaves_nothing, no_room_is_a_miss,
     a_node_lends_so_many_at_a_time, a_scope_that_ends_is_joined_again,
     a_file_that_is_gone_is_a_miss, through_the_distribution_channel, who_holds_what,
     a_store_that_ends_is_no_store, whoever_is_killed_at_any_piece].

init_per_testcase(Case, Config) ->
    ok = erllama_cache_nodes_util:distribute(Case),
    Nodes = [erllama_cache_nodes_util:start() || _ <- lists:seq(1, nodes_for(Case))],
    Roots = [root(Case, N, Config) || {N, _} <- enumerate(Nodes)],
    [
        begin
            ok = start_store(Node, Root, #{}),
            Args = [#{host => erllama_cache_store}],
            {ok, _} = erllama_cache_nodes_util:unlinked(Node, ?WRITER, start_link, Args)
        end
     || {{_, Node}, Root} <- lists:zip(Nodes, Roots)
    ],
    ok = know_each_other(Nodes),
    [{nodes, Nodes}, {roots, Roots} | Config].

end_per_testcase(_Case, Config) ->
    [erllama_cache_nodes_util:stop(Node) || Node <- ?config(nodes, Config)],
    ok.

nodes_for(the_longest_is_found_wherever_it_is) -> 3;
nodes_for(the_next_peer_is_tried) -> 3;
nodes_for(who_holds_what) -> 3;
nodes_for(whoever_is_killed_at_any_piece) -> 3;
nodes_for(_) -> 2.

enumerate(List) ->
    lists:zip(lists:seq(1, length(List)), List).

root(Case, N, Config) ->
    Root = filename:join(?config(priv_dir, Config), lists:concat([Case, "_", N])),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    Root.

start_store(Node, Root, Options) ->
    erllama_cache_nodes_util:start_store(
        Node, ?STORE, maps:merge(#{root => Root, peers => ?GROUP, peer_timeout => 5000}, Options)
    ).

%% Membership travels by messages.
know_each_other(Nodes) ->
    [
        eventually(fun() ->
            Members = erpc:call(Node, pg, get_members, [erllama_cache_peers, {stores, ?GROUP}]),
            length(Members) =:= length(Nodes)
        end)
     || {_, Node} <- Nodes
    ],
    ok.

nodes_of(Config) ->
    [Node || {_, Node} <- ?config(nodes, Config)].

meta(N) ->
    erllama_cache_test_util:meta([N]).

save(Node, N, Payload) ->
    {ok, Key} = erpc:call(Node, ?WRITER, save, [?STORE, disk, meta(N), Payload]),
    Key.

load(Node, Key) ->
    erpc:call(Node, erllama_cache_store, load, [?STORE, Key]).

info(Node) ->
    erpc:call(Node, erllama_cache_store, info, [?STORE]).

names(Root) ->
    {ok, Names} = file:list_dir(Root),
    Names.

%% All that a fetch makes is gone: files without their names, locks, sockets, rows.
assert_nothing_left(Node, Root, Names) ->
    ?assertEqual(Names, names(Root)),
    eventually(fun() -> maps:get(reservations, info(Node)) =:= 0 end),
    eventually(fun() -> imports(Node) =:= 0 end).

imports(Node) ->
    maps:get(import, erpc:call(Node, erllama_cache_nif, live_objects, [])).

a_load_takes_what_a_peer_has(Config) ->
    [A, B] = nodes_of(Config),
    [RootA, RootB] = ?config(roots, Config),
    Key = save(A, 1, <<"payload">>),
    ?assertEqual(miss, erpc:call(B, erllama_cache_store, load, [?STORE, Key, #{peers => false}])),
    ?assertMatch({ok, #{tokens := <<1:32/little>>}, <<"payload">>}, load(B, Key)),
    ?assertEqual(file:read_file(file_of(RootA, Key)), file:read_file(file_of(RootB, Key))),
    ?assertMatch(#{fetched := 1, files := 1, fetch_failures := 0}, info(B)),
    %% It is here now.
    ?assertMatch({ok, _, <<"payload">>},
                 erpc:call(B, erllama_cache_store, load, [?STORE, Key, #{peers => false}])),
    ?assertMatch({ok, Key, 1},
                 erpc:call(B, erllama_cache_store, longest_prefix, [?STORE, meta(1)])),
    ok = erpc:call(A, erllama_cache_store, delete, [?STORE, Key]),
    ?assertMatch({ok, _, <<"payload">>}, load(B, Key)).

of_every_size(Config) ->
    [A, B] = nodes_of(Config),
    [
        begin
            Payload = rand:bytes(Size),
            Key = save(A, N, Payload),
            ?assertEqual(ok, erpc:call(B, erllama_cache_peers, fetch, [?STORE, Key])),
            ?assertMatch({ok, _, Payload}, load(B, Key))
        end
     || {N, Size} <- enumerate([0, 1, 65536, 524288, 3 bsl 20, (17 bsl 20) + 5])
    ].

nobody_is_asked_in_vain(Config) ->
    [_, B] = nodes_of(Config),
    {ok, Key} = erllama_cache_store:key(meta(1)),
    ?assertEqual(miss, load(B, Key)),
    ?assertEqual(miss, erpc:call(B, erllama_cache_peers, fetch, [?STORE, Key])),
    ?assertEqual(miss, erpc:call(B, erllama_cache_peers, find, [?STORE, [Key]])),
    ?assertMatch(#{fetched := 0, fetch_failures := 0}, info(B)).

the_longest_is_found_wherever_it_is(Config) ->
    [A, B, C] = nodes_of(Config),
    Long = save(A, 1, <<"long">>),
    Middle = save(B, 2, <<"middle">>),
    Short = save(C, 3, <<"short">>),
    {ok, None} = erllama_cache_store:key(meta(4)),
    Find = fun(Node, Keys) -> erpc:call(Node, erllama_cache_peers, find, [?STORE, Keys]) end,
    ?assertEqual({ok, Long, A}, Find(C, [None, Long, Middle, Short])),
    ?assertEqual({ok, Middle, B}, Find(C, [None, Middle, Long, Short])),
    ?assertEqual({ok, Short, C}, Find(C, [Short, Middle, Long])),
    ?assertEqual({ok, Short, C}, Find(A, [None, Short])),
    ?assertEqual(miss, Find(A, [None])),
    ?assertEqual(miss, Find(A, [])).

many_loads_share_one_fetch(Config) ->
    [A, B] = nodes_of(Config),
    Payload = rand:bytes(8 bsl 20),
    Key = save(A, 1, Payload),
    Requests = [erpc:send_request(B, erllama_cache_store, load, [?STORE, Key])
                || _ <- lists:seq(1, 20)],
    [?assertMatch({ok, _, Payload}, erpc:receive_response(Request, 20000)) || Request <- Requests],
    ?assertMatch(#{fetched := 1, fetch_failures := 0}, info(B)).

a_bad_file_is_not_taken(Config) ->
    [A, B] = nodes_of(Config),
    [RootA, RootB] = ?config(roots, Config),
    Key = save(A, 1, rand:bytes(2 bsl 20)),
    ok = flip_last_bit(file_of(RootA, Key)),
    ?assertEqual(miss, load(B, Key)),
    ?assertMatch(#{fetched := 0, fetch_failures := 1}, info(B)),
    assert_nothing_left(B, RootB, []).

flip_last_bit(File) ->
    {ok, Bytes} = file:read_file(File),
    file:write_file(File, erllama_cache_test_util:flip(Bytes, byte_size(Bytes) - 1)).

the_next_peer_is_tried(Config) ->
    [A, B, C] = nodes_of(Config),
    Payload = rand:bytes(1 bsl 20),
    Key = save(A, 1, Payload),
    Key = save(B, 1, Payload),
    ok = flip_last_bit(file_of(hd(?config(roots, Config)), Key)),
    %% They are asked in any order.
    eventually(fun() ->
        ?assertMatch({ok, _, Payload}, load(C, Key)),
        ok = erpc:call(C, erllama_cache_store, delete, [?STORE, Key]),
        maps:get(fetch_failures, info(C)) > 0
    end).

only_a_secret_that_is_shared(Config) ->
    [A, B] = nodes_of(Config),
    [_, RootB] = ?config(roots, Config),
    Key = save(A, 1, <<"payload">>),
    ok = erpc:call(B, gen_server, stop, [?STORE]),
    Secret = fun() -> <<7:256>> end,
    ok = start_store(B, RootB, #{mac_key => Secret}),
    ok = know_each_other(?config(nodes, Config)),
    ?assertEqual(miss, load(B, Key)),
    ?assertMatch(#{fetched := 0, fetch_failures := 1}, info(B)),
    assert_nothing_left(B, RootB, []).

%% Its name is gone before the first byte is sent.
an_evicted_file_still_arrives(Config) ->
    [A, B] = nodes_of(Config),
    Payload = rand:bytes(4 bsl 20),
    Key = save(A, 1, Payload),
    Ticket = rand:bytes(32),
    {ok, Size, Address, Port} = offer(A, Key, Ticket, self()),
    ok = erpc:call(A, erllama_cache_store, delete, [?STORE, Key]),
    Bytes = received(Address, Port, Ticket, Size),
    ?assertEqual(Payload, binary:part(Bytes, Size, -byte_size(Payload))),
    ?assertEqual(miss, load(B, Key)).

offer(Node, Key, Ticket, Borrower) ->
    erpc:call(Node, erllama_cache_lend, offer, [tcp, ?STORE, Key, Ticket, Borrower]).

received(Address, Port, Ticket, Size) ->
    {ok, Socket} = gen_tcp:connect(Address, Port, [binary, {active, false}]),
    ok = gen_tcp:send(Socket, Ticket),
    {ok, Bytes} = gen_tcp:recv(Socket, Size, 5000),
    ok = gen_tcp:close(Socket),
    Bytes.

a_lender_that_dies_costs_a_moment(Config) ->
    [{PeerA, A}, {_, B}] = ?config(nodes, Config),
    [_, RootB] = ?config(roots, Config),
    Key = save(A, 1, rand:bytes(64 bsl 20)),
    Request = erpc:send_request(B, erllama_cache_store, load, [?STORE, Key]),
    eventually(fun() -> imports(B) > 0 end),
    ok = peer:stop(PeerA),
    %% Its last byte may have been on the way.
    case erpc:receive_response(Request, 20000) of
        miss -> assert_nothing_left(B, RootB, []);
        {ok, _, _} -> ok
    end.

%% By the peers' own pipes: a node that is connected with both would mend it, or end it for all.
a_partition_is_a_miss(Config) ->
    [{PeerA, A}, {PeerB, B}] = Nodes = ?config(nodes, Config),
    Key = save(A, 1, <<"payload">>),
    %% From the second on, `global' may have done it before.
    [_ = erlang:disconnect_node(Node) || {_, Node} <- Nodes],
    _ = peer:call(PeerB, erlang, disconnect_node, [A]),
    eventually(fun() -> peer:call(PeerB, erlang, nodes, []) =:= [] end),
    ?assertEqual(miss, peer:call(PeerB, erllama_cache_store, load, [?STORE, Key])),
    true = peer:call(PeerA, net_kernel, connect_node, [B]),
    eventually(fun() ->
        length(peer:call(PeerB, pg, get_members, [erllama_cache_peers, {stores, ?GROUP}])) =:= 2
    end),
    ?assertMatch({ok, _, <<"payload">>},
                 peer:call(PeerB, erllama_cache_store, load, [?STORE, Key])).

a_ticket_is_good_for_one_connection(Config) ->
    [A, _] = nodes_of(Config),
    Key = save(A, 1, <<"payload">>),
    Ticket = rand:bytes(32),
    {ok, Size, Address, Port} = offer(A, Key, Ticket, self()),
    {ok, Stranger} = gen_tcp:connect(Address, Port, [binary, {active, false}]),
    ok = gen_tcp:send(Stranger, rand:bytes(32)),
    ?assertEqual({error, closed}, gen_tcp:recv(Stranger, 0, 5000)),
    _ = received(Address, Port, Ticket, Size),
    ?assertMatch({error, _}, gen_tcp:connect(Address, Port, [])),
    {ok, NoKey} = erllama_cache_store:key(meta(2)),
    ?assertEqual({error, gone}, offer(A, NoKey, Ticket, self())).

a_borrower_that_dies_leaves_nothing(Config) ->
    [A, B] = nodes_of(Config),
    [_, RootB] = ?config(roots, Config),
    Key = save(A, 1, rand:bytes(64 bsl 20)),
    Caller = spawn(B, fun() -> erllama_cache_store:load(?STORE, Key) end),
    eventually(fun() -> imports(B) > 0 end),
    %% The fetch is for others, too, and goes on.
    true = exit(Caller, kill),
    eventually(fun() -> maps:get(fetched, info(B)) =:= 1 end),
    %% Killed itself, it leaves nothing, unless its file had its name already.
    eventually(fun() ->
        ok = erpc:call(B, erllama_cache_store, delete, [?STORE, Key]),
        _ = spawn(B, fun() -> erllama_cache_store:load(?STORE, Key) end),
        eventually(fun() -> imports(B) > 0 orelse names(RootB) =/= [] end),
        erpc:call(B, fun kill_flights/0) =/= []
    end),
    eventually(fun() -> maps:get(reservations, info(B)) + imports(B) =:= 0 end),
    ?assertEqual([], names(RootB) -- [filename:basename(file_of(RootB, Key))]),
    %% Nor does a flight that was killed stop the next one.
    ?assertMatch({ok, _, _}, load(B, Key)).

%% Runs on a node.
kill_flights() ->
    [
        exit(Pid, kill)
     || Pid <- processes(),
        {current_stacktrace, Stack} <- [process_info(Pid, current_stacktrace)],
        lists:keymember(erllama_cache_borrow, 1, Stack)
    ].

no_room_is_a_miss(Config) ->
    [A, B] = nodes_of(Config),
    [_, RootB] = ?config(roots, Config),
    Key = save(A, 1, rand:bytes(1 bsl 20)),
    ok = erpc:call(B, gen_server, stop, [?STORE]),
    ok = start_store(B, RootB, #{max_bytes => 1000}),
    ok = know_each_other(?config(nodes, Config)),
    ?assertEqual(miss, load(B, Key)),
    ?assertEqual({error, exceeds_max_bytes},
                 erpc:call(B, erllama_cache_peers, fetch, [?STORE, Key])),
    assert_nothing_left(B, RootB, []).

%% Also when each lender's garbage has been collected: a slot is not garbage.
a_node_lends_so_many_at_a_time(Config) ->
    [A, B] = nodes_of(Config),
    Key = save(A, 1, <<"payload">>),
    Tickets = [rand:bytes(32) || _ <- lists:seq(1, 8)],
    Offers = [offer(A, Key, Ticket, self()) || Ticket <- Tickets],
    _ = erpc:call(A, fun() -> [garbage_collect(Pid) || Pid <- processes()] end),
    ?assertEqual({error, busy}, offer(A, Key, rand:bytes(32), self())),
    ?assertEqual(miss, load(B, Key)),
    ?assertMatch(#{fetch_failures := 0}, info(B)),
    [received(Address, Port, Ticket, Size)
     || {Ticket, {ok, Size, Address, Port}} <- lists:zip(Tickets, Offers)],
    eventually(fun() -> loads(B, Key) end).

loads(Node, Key) ->
    is_tuple(load(Node, Key)).

a_scope_that_ends_is_joined_again(Config) ->
    [A, B] = nodes_of(Config),
    Key = save(A, 1, <<"payload">>),
    true = exit(erpc:call(B, erlang, whereis, [erllama_cache_peers]), kill),
    eventually(fun() -> loads(B, Key) end).

a_file_that_is_gone_is_a_miss(Config) ->
    [A, B] = nodes_of(Config),
    [RootA, _] = ?config(roots, Config),
    Key = save(A, 1, <<"payload">>),
    %% What its index knows is gone.
    ok = file:delete(file_of(RootA, Key)),
    ?assertEqual(miss, load(B, Key)),
    ?assertMatch(#{fetched := 0, fetch_failures := 1}, info(B)).

through_the_distribution_channel(Config) ->
    [A, B] = nodes_of(Config),
    [_, RootB] = ?config(roots, Config),
    ok = erpc:call(B, gen_server, stop, [?STORE]),
    ok = start_store(B, RootB, #{peer_transport => distribution}),
    ok = know_each_other(?config(nodes, Config)),
    Keys = [
        begin
            Payload = rand:bytes(Size),
            Key = save(A, N, Payload),
            ?assertMatch({ok, _, Payload}, load(B, Key)),
            Key
        end
     || {N, Size} <- enumerate([0, 1, 262144, (3 bsl 20) + 1])
    ],
    ?assertMatch(#{fetched := 4, fetch_failures := 0}, info(B)),
    %% The one who sends ends with the one who takes.
    {Borrower, _} = spawn_monitor(fun() -> receive stop -> ok end end),
    {ok, _, Sender, pieces} =
        erpc:call(A, erllama_cache_lend, offer_pieces, [?STORE, hd(Keys), Borrower]),
    Monitor = monitor(process, Sender),
    true = exit(Borrower, kill),
    receive {'DOWN', Monitor, process, Sender, normal} -> ok end.

%% Against a model that is a set of who has which key: a load gives what anybody has, and whoever
%% loads has it from then on.
who_holds_what(Config) ->
    Nodes = enumerate(lists:zip(nodes_of(Config), ?config(roots, Config))),
    Property = ?FORALL(Steps, list(step()), begin
        [ok = delete(Node, key(N)) || {_, {Node, _}} <- Nodes, N <- keys()],
        Held = lists:foldl(
            fun(Step, Held) -> take(Step, Nodes, ?config(nodes, Config), Held) end, [], Steps
        ),
        [
            ?assertEqual(is_there(lists:member({Id, N}, Held)),
                         is_there(load_here(Node, key(N)) =/= miss))
         || {Id, {Node, _}} <- Nodes, N <- keys()
        ],
        true
    end),
    true = proper:quickcheck(Property, [{numtests, 40}, {to_file, user}, quiet]).

is_there(true) -> there;
is_there(false) -> not_there.

keys() ->
    [1, 2, 3].

step() ->
    {frequency([{3, save}, {4, load}, {2, delete}, {1, restart}]), range(1, 3), oneof(keys())}.

take({save, Id, N}, Nodes, _, Held) ->
    {Node, _} = node_and_root(Id, Nodes),
    Expected = case lists:member({Id, N}, Held) of
        true -> {error, already_present};
        false -> {ok, key(N)}
    end,
    ?assertEqual(Expected, erpc:call(Node, ?WRITER, save, [?STORE, disk, meta(N), payload(N)])),
    lists:usort([{Id, N} | Held]);
take({load, Id, N}, Nodes, _, Held) ->
    {Node, _} = node_and_root(Id, Nodes),
    Payload = payload(N),
    case lists:keymember(N, 2, Held) of
        true ->
            ?assertMatch({ok, _, Payload}, load(Node, key(N))),
            lists:usort([{Id, N} | Held]);
        false ->
            ?assertEqual(miss, load(Node, key(N))),
            Held
    end;
take({delete, Id, N}, Nodes, _, Held) ->
    {Node, _} = node_and_root(Id, Nodes),
    ok = delete(Node, key(N)),
    lists:delete({Id, N}, Held);
take({restart, Id, _}, Nodes, All, Held) ->
    {Node, Root} = node_and_root(Id, Nodes),
    ok = erpc:call(Node, gen_server, stop, [?STORE]),
    ok = start_store(Node, Root, #{}),
    ok = know_each_other(All),
    Held.

node_and_root(Id, Nodes) ->
    {Id, Found} = lists:keyfind(Id, 1, Nodes),
    Found.

key(N) ->
    {ok, Key} = erllama_cache_store:key(meta(N)),
    Key.

payload(N) ->
    binary:copy(<<N:32>>, 10000 * N).

delete(Node, Key) ->
    erpc:call(Node, erllama_cache_store, delete, [?STORE, Key]).

load_here(Node, Key) ->
    erpc:call(Node, erllama_cache_store, load, [?STORE, Key, #{peers => false}]).

a_store_that_ends_is_no_store(Config) ->
    [_, B] = nodes_of(Config),
    {ok, Key} = erllama_cache_store:key(meta(1)),
    ok = erpc:call(B, gen_server, stop, [?STORE]),
    ?assertExit({exception, {noproc, _}}, load(B, Key)),
    ?assertExit({exception, {noproc, _}}, erpc:call(B, erllama_cache_peers, fetch, [?STORE, Key])).

%% A lender's process, the borrower's, or a lender's whole node, at some piece of the file: so
%% often, or as often as $PEER_KILLS says.
whoever_is_killed_at_any_piece(Config) ->
    Payload = rand:bytes(16 bsl 20),
    [LenderA, LenderB, {_, C}] = ?config(nodes, Config),
    Key = save(element(2, LenderA), 1, Payload),
    Key = save(element(2, LenderB), 1, Payload),
    Kills = list_to_integer(os:getenv("PEER_KILLS", "20")),
    Ended = lists:foldl(
        fun(N, {Lender, Results}) ->
            {Next, Result} = killed(N, Lender, LenderB, C, Key, Payload, Config),
            {Next, [Result | Results]}
        end,
        {LenderA, []},
        lists:seq(1, Kills)
    ),
    {Last, Results} = Ended,
    ct:pal("of ~b fetches ~b were a miss", [Kills, length([miss || miss <- Results])]),
    erllama_cache_nodes_util:stop(Last).

killed(N, {_, A} = Lender, {_, B}, C, Key, Payload, Config) ->
    [RootA, _, RootC] = ?config(roots, Config),
    Request = erpc:send_request(C, erllama_cache_store, load, [?STORE, Key]),
    Microseconds = rand:uniform(30000),
    case N rem 10 of
        0 -> after_import(C, Microseconds, fun() -> erllama_cache_nodes_util:stop(Lender) end);
        Odd when Odd rem 2 =:= 1 -> ok = erpc:call(C, ?MODULE, kill_borrower, [Microseconds]);
        _ ->
            after_import(C, Microseconds, fun() ->
                [erpc:call(Node, ?MODULE, kill_lenders, []) || Node <- [A, B]]
            end)
    end,
    Result = case erpc:receive_response(Request, 20000) of
        {ok, _, Payload} -> ok;
        miss -> miss
    end,
    %% A borrower may be killed when the file has its name already.
    Left = case names(RootC) of
        [] when Result =:= miss ->
            [];
        [Name] ->
            ?assertEqual(Name, filename:basename(file_of(RootC, Key))),
            Loaded = erpc:call(C, erllama_cache_store, load, [?STORE, Key, #{peers => false}]),
            ?assertMatch({ok, _, Payload}, Loaded),
            [Name]
    end,
    assert_nothing_left(C, RootC, Left),
    ok = erpc:call(C, erllama_cache_store, delete, [?STORE, Key]),
    Next = case N rem 10 of
        0 -> start_again(RootA);
        _ -> Lender
    end,
    eventually(fun() ->
        lists:append([erpc:call(Node, ?MODULE, lenders, []) || {_, Node} <- [Next, {b, B}]]) =:= []
    end),
    ok = know_each_other([Next, {b, B}, {c, C}]),
    {Next, Result}.

start_again(Root) ->
    {_, Node} = Started = erllama_cache_nodes_util:start(),
    ok = start_store(Node, Root, #{}),
    Args = [#{host => erllama_cache_store}],
    {ok, _} = erllama_cache_nodes_util:unlinked(Node, ?WRITER, start_link, Args),
    Started.

%% When a fetch has begun on that node, and somewhat later.
after_import(Node, Microseconds, Fun) ->
    ok = erpc:call(Node, ?MODULE, await_import, [Microseconds]),
    Fun().

%% Without a pause: a fetch takes some milliseconds.
await_import(Microseconds) ->
    Deadline = erlang:monotonic_time(millisecond) + 5000,
    ok = await_import_until(Deadline),
    spin_until(erlang:monotonic_time(microsecond) + Microseconds).

await_import_until(Deadline) ->
    case maps:get(import, erllama_cache_nif:live_objects()) of
        0 ->
            case erlang:monotonic_time(millisecond) < Deadline of
                true -> await_import_until(Deadline);
                %% It was quicker than this.
                false -> ok
            end;
        _ ->
            ok
    end.

spin_until(Time) ->
    case erlang:monotonic_time(microsecond) < Time of
        true -> spin_until(Time);
        false -> ok
    end.

kill_borrower(Microseconds) ->
    ok = await_import(Microseconds),
    [exit(Pid, kill) || Table <- ets:all(), ets:info(Table, name) =:= flights,
                        {_, Pid} <- ets:tab2list(Table), is_pid(Pid)],
    ok.

kill_lenders() ->
    [exit(Pid, kill) || Pid <- lenders()],
    ok.

%% The processes that have a file open which they lend, with their slot.
lenders() ->
    [Pid || Pid <- processes(), {dictionary, Words} <- [process_info(Pid, dictionary)],
            lists:keymember(erllama_cache_lend, 1, Words)].
