%% What it costs to take a state from another node: `make bench-fetch'. Two nodes of this machine, a
%% store in each. A fetch is durable when it ends; it is measured in turns with what it is made of,
%% which are the same file by `sendfile' to a receiver that throws it away, and a save of as many
%% bytes. Meanwhile one process calls the other node again and again. Then a store asks eight peers,
%% none of which has what it wants. Files are in $BENCH_DISK, default /tmp.
-module(bench_fetch).

-export([main/0]).
%% Called on the other nodes.
-export([lend/3, send_file/1]).

-import(bench_turns, [size_name/1]).

-define(GROUP, bench_group).
%% Takes files from the other node; saves to a root of its own.
-define(STORE, bench_store).
-define(SAVER, bench_saver).
-define(SIZES, [{256, 7}, {1024, 5}]).
-define(PEERS, 8).
-define(KEYS, 32).
-define(QUESTIONS, 2000).
%% How much is received at a time by whoever throws it away.
-define(PIECE, 524288).

main() ->
    bench_report:main(fetch, fun run/0).

run() ->
    Root = bench_turns:new_root("BENCH_DISK", "/tmp"),
    _ = os:cmd("epmd -daemon"),
    {ok, _} = net_kernel:start([list_to_atom("bench_" ++ os:getpid()), shortnames]),
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    {ok, _} = erllama_cache_writer:start_link(#{
        host => erllama_cache_store, max_concurrent => 16, slow_save_ms => 600000
    }),
    try
        {Values, Fetches} = fetches(Root),
        {QuestionValues, Question} = questions(Root),
        {Values ++ QuestionValues, #{fetch_ns => Fetches, question_ns => Question}}
    after
        ok = file:del_dir_r(Root)
    end.

%%% A fetch, and what it is made of

fetches(Root) ->
    {Peer, Node} = start_node(),
    Lent = sub(Root, "lender"),
    ok = erpc:call(Node, ?MODULE, lend, [Lent, ?STORE, ?GROUP]),
    {ok, _} = start_store(?STORE, sub(Root, "borrower"), #{peers => ?GROUP}),
    {ok, _} = start_store(?SAVER, sub(Root, "saver"), #{}),
    ok = meet(Node),
    Rows = [
        {bench_turns:mib(Mib), rounds(Node, Lent, Mib, bench_report:rounds(Rounds))}
     || {Mib, Rounds} <- ?SIZES
    ],
    peer:stop(Peer),
    [ok = gen_server:stop(Store) || Store <- [?STORE, ?SAVER]],
    io:format("~nfetch, beside what it is made of (milliseconds: p50; the longest of all rounds; "
              "erpc:call to the same node meanwhile: p50, p99)~n"),
    [say(Row) || Row <- Rows],
    {lists:append([values(Row) || Row <- lists:zip([m256, m1024], Rows)]), maps:from_list(Rows)}.

say({Size, #{fetch := Fetch, sendfile := Sendfile, save := Save, call := Call}}) ->
    io:format("  ~-8ts", [size_name(Size)]),
    [io:format("   ~ts ~9.1f ~9.1f", [Name, P50 / 1.0e6, Max / 1.0e6])
     || {Name, #{p50 := P50, max := Max}} <-
            [{"fetch", Fetch}, {"sendfile", Sendfile}, {"save", Save}]],
    #{p50 := P50, p99 := P99} = Call,
    io:format("   call ~9.3f ~9.3f~n", [P50 / 1.0e6, P99 / 1.0e6]).

values({Id, {_Size, #{fetch := #{p50 := Fetch}, sendfile := #{p50 := Sendfile},
                      save := #{p50 := Save}, call := #{p99 := Call}}}}) ->
    Ids = case Id of m256 -> {fetch_256m, call_256m}; m1024 -> {fetch_1g, call_1g} end,
    [{element(1, Ids), Fetch / max(Sendfile, Save)}, {element(2, Ids), Call / 1.0e6}].

rounds(Node, Lent, Mib, Rounds) ->
    Payload = bench_turns:payload(bench_turns:mib(Mib)),
    {ok, Key} = erpc:call(Node, erllama_cache_writer, save,
                          [?STORE, disk, bench_sides:meta(bench_sides:fresh()), Payload]),
    Name = filename:join(Lent, bench_turns:file_name(Key)),
    Sides = [fetch, sendfile, save],
    %% The first is not counted.
    [_ | Counted] = [
        [{Side, side(Side, Node, Key, Name, Payload)} || Side <- bench_turns:order(Round, Sides)]
     || Round <- lists:seq(0, Rounds)
    ],
    ok = erpc:call(Node, erllama_cache_store, delete, [?STORE, Key]),
    All = lists:append(Counted),
    Times = maps:from_list([
        {Side, bench_report:summary([Time || {Of, {Time, _}} <- All, Of =:= Side])}
     || Side <- Sides
    ]),
    Times#{call => bench_report:summary(lists:append([Calls || {fetch, {_, Calls}} <- All]))}.

side(fetch, Node, Key, _Name, _Payload) ->
    Calls = start_calls(Node),
    [{fetch, Time}] = bench_turns:in_turns([
        {fetch, fun() -> ok = erllama_cache_peers:fetch(?STORE, Key) end}
    ]),
    Called = stop_calls(Calls),
    ok = erllama_cache_store:delete(?STORE, Key),
    {Time, Called};
side(sendfile, Node, _Key, Name, _Payload) ->
    [{sendfile, Time}] = bench_turns:in_turns([{sendfile, fun() -> thrown_away(Node, Name) end}]),
    {Time, []};
side(save, _Node, _Key, _Name, Payload) ->
    Meta = bench_sides:meta(bench_sides:fresh()),
    [{save, Time}] = bench_turns:in_turns([
        {save, fun() -> {ok, _} = erllama_cache_writer:save(?SAVER, disk, Meta, Payload) end}
    ]),
    {ok, Saved} = erllama_cache_store:key(Meta),
    ok = erllama_cache_store:delete(?SAVER, Saved),
    {Time, []}.

thrown_away(Node, Name) ->
    {ok, Port} = erpc:call(Node, ?MODULE, send_file, [Name]),
    Options = [binary, {active, false}, {buffer, ?PIECE}],
    {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, Options),
    ok = throw_away(Socket).

throw_away(Socket) ->
    case gen_tcp:recv(Socket, ?PIECE, 10000) of
        {ok, _} -> throw_away(Socket);
        %% With what is less than a piece.
        {error, closed} -> ok
    end.

%%% Calls of the same node meanwhile

start_calls(Node) ->
    spawn_monitor(fun() -> exit({called, calls(Node, [])}) end).

stop_calls({Pid, Monitor}) ->
    Pid ! stop,
    receive {'DOWN', Monitor, process, Pid, {called, Calls}} -> Calls end.

calls(Node, Calls) ->
    receive
        stop -> Calls
    after 1 ->
        Time = bench_turns:nanoseconds(fun() -> Node = erpc:call(Node, erlang, node, []) end),
        calls(Node, [Time | Calls])
    end.

%%% A question to peers that have nothing

questions(Root) ->
    Nodes = [start_node() || _ <- lists:seq(1, ?PEERS)],
    [
        ok = erpc:call(Node, ?MODULE, lend, [sub(Root, atom_to_list(Node)), ?STORE, ?GROUP])
     || {_, Node} <- Nodes
    ],
    {ok, _} = start_store(?STORE, sub(Root, "asker"), #{peers => ?GROUP}),
    [ok = meet(Node) || {_, Node} <- Nodes],
    Ask = fun() ->
        miss = erllama_cache_peers:find(?STORE, [rand:bytes(32) || _ <- lists:seq(1, ?KEYS)])
    end,
    [Ask() || _ <- lists:seq(1, 100)],
    Times = [bench_turns:nanoseconds(Ask) || _ <- lists:seq(1, bench_report:large(?QUESTIONS))],
    ok = gen_server:stop(?STORE),
    [peer:stop(Peer) || {Peer, _} <- Nodes],
    #{p50 := P50, p99 := P99, max := Max} = Summary = bench_report:summary(Times),
    io:format("~nquestion to ~w peers for ~w keys that none has (milliseconds: p50, p99, max)~n"
              "  ~9.3f ~9.3f ~9.3f~n", [?PEERS, ?KEYS, P50 / 1.0e6, P99 / 1.0e6, Max / 1.0e6]),
    {[{question, P99 / 1.0e6}], Summary}.

%%% Nodes

start_node() ->
    Paths = lists:append([
        ["-pa", filename:dirname(code:which(Module))] || Module <- [erllama_cache_nif, ?MODULE]
    ]),
    {ok, Peer, Node} = peer:start(#{
        name => peer:random_name(), connection => standard_io,
        args => ["-setcookie", atom_to_list(erlang:get_cookie()) | Paths]
    }),
    true = net_kernel:connect_node(Node),
    {Peer, Node}.

%% Starts a store with a writer, for as long as the node runs.
-spec lend(binary(), erllama_cache_store:name(), atom()) -> ok.
lend(Root, Store, Group) ->
    {ok, _} = application:ensure_all_started(erllama_cache_nif),
    Self = self(),
    Owner = spawn(fun() ->
        {ok, _} = start_store(Store, Root, #{peers => Group}),
        {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
        Self ! {self(), started},
        receive stop -> ok end
    end),
    receive {Owner, started} -> ok after 10000 -> error(not_started) end.

start_store(Store, Root, Options) ->
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    erllama_cache_store:start_link(Store, Options#{root => Root}).

sub(Root, Name) ->
    unicode:characters_to_binary(filename:join(Root, Name)).

%% Sends a file to whoever connects, once.
-spec send_file(Name :: file:name_all()) -> {ok, inet:port_number()}.
send_file(Name) ->
    Self = self(),
    _ = spawn(fun() ->
        {ok, Listen} = gen_tcp:listen(0, [binary, {active, false}, {ip, {127, 0, 0, 1}}]),
        {ok, Port} = inet:port(Listen),
        Self ! {port, Port},
        {ok, Socket} = gen_tcp:accept(Listen, 10000),
        {ok, File} = file:open(Name, [read, raw, binary]),
        {ok, _} = file:sendfile(File, Socket, 0, 0, []),
        ok = gen_tcp:close(Socket)
    end),
    receive {port, Port} -> {ok, Port} after 10000 -> error(no_port) end.

%% Until the stores of both nodes know of each other.
meet(Node) ->
    meet(Node, 1000).

meet(Node, 0) ->
    error({not_met, Node});
meet(Node, Left) ->
    Known = [node(Pid) || Pid <- pg:get_members(erllama_cache_peers, {stores, ?GROUP})],
    case lists:member(Node, Known) of
        true -> ok;
        false -> timer:sleep(10), meet(Node, Left - 1)
    end.
