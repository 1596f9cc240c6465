%% Kills nodes in the middle of their saves, again and again, and looks at what is left.
%%
%% Two nodes, each an operating system process of its own, save the same keys into one root, with
%% payloads that tell whose they are. One of them, or both, gets a `kill -9' at a moment that is
%% drawn; the other goes on while the killed one starts again on the root. Then both are asked for
%% every key. run.sh runs this; what it takes from the environment is said there.
%%
%% In a storm with saves behind their callers (KILL_BEHIND), a save that was answered is promised
%% when a flush that began later has returned. Before that it may be missing after a kill, and then
%% is saved once more.
-module(erllama_cache_kill).

-export([main/0, node_main/0, log/2]).

-import(erllama_cache_test_util, [eventually/1, open_files/1, run_command/2]).

-compile({no_auto_import, [round/1]}).

-define(STORE, kill_store).
-define(WRITER, erllama_cache_writer).
-define(SAVERS, 8).
%% Behind their callers, so many saves may be pending, and so many of them may run.
-define(PENDING, 16).
-define(RUNNING, 4).
%% How many keys a node is given at a time, and after how many milliseconds at most a kill comes.
-define(BATCH, 48).
%% Less while another one starts, with pauses that grow by so many milliseconds: that can take long,
%% and all that is saved will be looked at.
-define(SMALL_BATCH, 12).
-define(PAUSE, 10).
-define(WINDOW, 300).
%% How long a node takes to start, about: some are killed in that time.
-define(STARTING, 400).
%% After so many kills the oracle, which is slow, looks at files of no more bytes than these. Then
%% all but so many are deleted.
-define(STAGE, 25).
-define(ORACLE_BYTES, 16 bsl 20).
-define(KEPT, 200).
%% Nothing that is waited for takes this long.
-define(DEADLINE, 120000).

%%% The one who kills

%% A node, and which of its lives.
-type whose() :: {1..2, pos_integer()}.

-record(node, {
    port :: port(),
    state :: starting | idle | busy,
    life :: pos_integer(),
    %% What it has been given to save and has not answered: it may be in there twice.
    open = [] :: [pos_integer()],
    %% What it has answered behind callers since its last flush, and what it had answered so when
    %% the flushes began that run.
    answered = [] :: [pos_integer()],
    flushing = #{} :: #{Flush :: integer() => [pos_integer()]},
    %% A save that is stopped before it publishes, for as long as the other node starts.
    held = none :: none | {asked | held, pos_integer()}
}).

-record(state, {
    root :: file:filename(),
    %% A shell: to start a program for each kill would give the killed the time to finish.
    shell = open_port({spawn_executable, "/bin/sh"}, []) :: port(),
    nodes = #{} :: #{1..2 => #node{}},
    lives = 0 :: non_neg_integer(),
    next = 1 :: pos_integer(),
    %% Small batches since a node was started.
    small = 0 :: non_neg_integer(),
    %% Keys that somebody was told of as saved or as already there.
    acknowledged = #{} :: #{pos_integer() => true},
    %% Whose payload a key was first seen with. It stays that until it is deleted.
    seen = #{} :: #{pos_integer() => whose()},
    %% Not looked at since they were saved.
    fresh = [] :: [pos_integer()],
    %% What the killed were in the middle of.
    cut = [] :: [{pos_integer(), whose()}],
    %% What the killed had only answered, and which of those are nowhere.
    only_answered = [] :: [{pos_integer(), whose()}],
    missing = [] :: [pos_integer()],
    %% The keys of those, since the oracle has looked at any.
    suspects = [] :: [pos_integer()],
    counts = #{} :: #{atom() => non_neg_integer()}
}).

-spec main() -> no_return().
main() ->
    Kills = list_to_integer(os:getenv("KILLS", "300")),
    Seed = list_to_integer(os:getenv("KILL_SEED", integer_to_list(seed()))),
    io:format("~b kills, KILL_SEED=~b~n", [Kills, Seed]),
    _ = rand:seed(exsss, Seed),
    Begun = erlang:monotonic_time(millisecond),
    try
        S = finish(rounds(Kills, start(2, start(1, #state{root = os:getenv("KILL_ROOT")})))),
        Took = erlang:monotonic_time(millisecond) - Begun,
        print([{seconds, Took div 1000} | table(S)]),
        assert_not_idle(Kills, S),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("FAILED, KILL_SEED=~b~n~p~n", [Seed, {Class, Reason, Stack}]),
            halt(1)
    end.

seed() ->
    erlang:system_time() rem 1000000.

rounds(Kills, S) ->
    case count(kills, S) of
        Killed when Killed >= Kills -> S;
        _ -> rounds(Kills, round(S))
    end.

round(S0) ->
    Victims = victims(),
    S1 = kill(Victims, save_for(uniform(?WINDOW), S0)),
    S2 = lists:foldl(fun start/2, hold([1, 2] -- Victims, S1), Victims),
    S3 = kill_while_starting(hd(Victims), uniform(8), S2),
    S4 = save_until(fun all_up/1, S3),
    S5 = save_missing(verify(settle(let_go(S4)))),
    case count(kills, S5) div ?STAGE > count(kills, S0) div ?STAGE of
        true -> next_stage(oracle(S5));
        false -> S5
    end.

victims() ->
    case uniform(5) of
        1 -> [1, 2];
        _ -> [uniform(2)]
    end.

kill_while_starting(Id, 1, S0) ->
    S1 = save_for(uniform(?STARTING), S0),
    #{Id := #node{state = State}} = S1#state.nodes,
    start(Id, add(killed_while_starting, length([Id || State =:= starting]), kill([Id], S1)));
kill_while_starting(_Id, _, S) ->
    S.

%% While the killed one starts, the other has a save in the middle: that must not be swept.
hold([], S) ->
    S;
hold([Id], #state{next = Next, fresh = Fresh} = S) ->
    %% A large one: it is written before it is stopped.
    N = Next + (?BATCH + 1 - Next rem ?BATCH) rem ?BATCH,
    Asked = update(Id, fun(#node{port = Port} = Node) ->
        tell(Port, {hold, N}),
        Node#node{held = {asked, N}}
    end, S#state{next = N + 1, fresh = [N | Fresh]}),
    add(held, 1, save_until(fun(Sofar) -> is_held(Id, Sofar) end, Asked)).

is_held(Id, #state{nodes = Nodes}) ->
    #{Id := #node{held = Held}} = Nodes,
    element(1, Held) =:= held.

let_go(#state{nodes = Nodes} = S) ->
    [tell(Port, let_go) || #node{port = Port, held = {held, _}} <- maps:values(Nodes)],
    S.

uniform(N) ->
    rand:uniform(N).

all_up(#state{nodes = Nodes}) ->
    [] =:= [Id || {Id, #node{state = starting}} <- maps:to_list(Nodes)].

all_idle(#state{nodes = Nodes}) ->
    [] =:= [Id || {Id, #node{state = State, held = Held}} <- maps:to_list(Nodes),
                  State =/= idle orelse Held =/= none].

%%% Saving

save_for(Milliseconds, S) ->
    Ref = make_ref(),
    _ = erlang:send_after(Milliseconds, self(), Ref),
    save_until_message(Ref, S).

save_until_message(Ref, S0) ->
    S = feed(S0),
    receive
        Ref -> S;
        {Port, Message} when is_port(Port) -> save_until_message(Ref, heard(Port, Message, S))
    after ?DEADLINE -> error({hung, S#state.nodes})
    end.

save_until(Done, S0) ->
    case Done(S0) of
        true -> S0;
        false -> save_until(Done, wait(feed(S0)))
    end.

settle(S) ->
    case all_idle(S) of
        true -> S;
        false -> settle(wait(S))
    end.

wait(S) ->
    receive
        {Port, Message} when is_port(Port) -> heard(Port, Message, S)
    after ?DEADLINE -> error({hung, S#state.nodes})
    end.

%% The next keys, for all who run, when all of those are done with the last ones: they are to be at
%% the same keys at the same time.
feed(#state{nodes = Nodes, next = Next, fresh = Fresh} = S) ->
    Up = [Id || {Id, #node{state = State}} <- maps:to_list(Nodes), State =/= starting],
    Busy = [Id || Id <- Up, (maps:get(Id, Nodes))#node.state =:= busy],
    case {Up, Busy} of
        {[_ | _], []} ->
            {Size, Small} = case maps:size(Nodes) =:= length(Up) of
                true -> {?BATCH, 0};
                false -> {?SMALL_BATCH, paused(S#state.small)}
            end,
            Numbers = lists:seq(Next, Next + Size - 1),
            %% Some twice, so that savers of one node meet too.
            Batch = lists:append([[N || _ <- lists:seq(0, length([x || N rem 5 =:= 0]))]
                                  || N <- Numbers]),
            Give = fun(Id, Sofar) -> give(Id, share(Id, Up, Batch), Sofar) end,
            Given = lists:foldl(Give, S, Up),
            Given#state{ next = Next + Size, small = Small, fresh = Numbers ++ Fresh};
        _ ->
            S
    end.

give(Id, Numbers, S) ->
    update(Id, fun(#node{port = Port} = Node) ->
        tell(Port, {save, Numbers}),
        Node#node{state = busy, open = Numbers}
    end, S).

%% Behind callers, two of three keys are one node's alone: nobody else is to save what that one has
%% only answered when it is killed.
share(Id, [_, _], Batch) ->
    case is_behind() of
        true -> [N || N <- Batch, N rem 3 =:= 0 orelse N rem 3 =:= Id];
        false -> Batch
    end;
share(_Id, [_Alone], Batch) ->
    Batch.

is_behind() ->
    os:getenv("KILL_BEHIND") =/= false.

paused(Small) ->
    receive
    after ?PAUSE * Small -> Small + 1
    end.

tell(Port, Term) ->
    true = port_command(Port, term_to_binary(Term)),
    ok.

heard(Port, Message, #state{nodes = Nodes} = S) ->
    [Id] = [Id || {Id, #node{port = P}} <- maps:to_list(Nodes), P =:= Port],
    case Message of
        {data, Data} -> handle(Id, binary_to_term(Data), S);
        Other -> error({died_unasked, Id, Other})
    end.

handle(Id, {up, #{unnamed := Unnamed}}, S) ->
    Unnamed = os:getenv("KILL_NAMED") =:= false,
    update(Id, fun(#node{state = starting} = Node) -> Node#node{state = idle} end, S);
handle(Id, {held, N}, S) ->
    update(Id, fun(#node{held = {asked, Same}} = Node) when Same =:= N ->
        Node#node{held = {held, N}}
    end, S);
handle(Id, {let_go, N, ok}, S) ->
    acknowledged(N, update(Id, fun(Node) -> Node#node{held = none} end, S));
handle(Id, {saved, N, Result}, S) ->
    acknowledge(N, Result, update(Id, fun(#node{open = Open} = Node) ->
        Node#node{open = lists:delete(N, Open)}
    end, S));
handle(Id, {answered, N, Result}, S) ->
    answered(Result, update(Id, fun(#node{open = Open, answered = Answered} = Node) ->
        Node#node{open = lists:delete(N, Open), answered = [N | Answered]}
    end, S));
handle(_Id, full, S) ->
    add(full, 1, S);
handle(Id, {flushing, Flush}, S) ->
    update(Id, fun(#node{answered = Answered, flushing = Flushing} = Node) ->
        Node#node{flushing = Flushing#{Flush => Answered}}
    end, S);
handle(Id, {flushed, Flush}, #state{nodes = Nodes} = S) ->
    #{Id := #node{answered = Answered, flushing = Flushing} = Node} = Nodes,
    {Promised, Others} = maps:take(Flush, Flushing),
    Left = Node#node{answered = Answered -- Promised, flushing = Others},
    Flushed = lists:foldl(fun acknowledged/2, S#state{nodes = Nodes#{Id := Left}}, Promised),
    add(flushed, length(Answered) - length(Left#node.answered), Flushed);
handle(Id, done, S) ->
    update(Id, fun(#node{open = [], answered = []} = Node) -> Node#node{state = idle} end, S);
handle(Id, Other, _S) ->
    error({from_node, Id, Other}).

update(Id, Fun, #state{nodes = Nodes} = S) ->
    S#state{nodes = Nodes#{Id := Fun(maps:get(Id, Nodes))}}.

acknowledge(N, ok, S) -> acknowledged(N, add(saved, 1, S));
acknowledge(N, {error, already_present}, S) -> acknowledged(N, add(already_present, 1, S));
%% Two savers of one node: nothing is known of the key yet.
acknowledge(N, {error, conflict}, S) when N rem 5 =:= 0 -> add(conflict, 1, S);
acknowledge(N, Other, S) -> error({save, N, Other, S#state.nodes}).

%% Behind its caller a save of a key that is pending in this node is no conflict.
answered(ok, S) -> add(answered, 1, S);
answered({error, already_present}, S) -> add(already_present, 1, S);
answered(Other, S) -> error({save, Other, S#state.nodes}).

acknowledged(N, #state{acknowledged = Acknowledged} = S) ->
    S#state{acknowledged = Acknowledged#{N => true}}.

%%% Killing and starting

start(Id, #state{nodes = Nodes, lives = Lives} = S) ->
    Life = Lives + 1,
    Port = open_port({spawn_executable, "/bin/sh"}, [
        nouse_stdio, {packet, 4}, binary, exit_status, eof,
        {env, [{"KILL_NODE", integer_to_list(Id)}, {"KILL_LIFE", integer_to_list(Life)},
               {"ERL_CRASH_DUMP_SECONDS", "0"}]},
        %% Helpers of a killed node say there that they have lost it.
        {args, ["-c", "exec erl \"$@\" 2>>\"$KILL_STDERR\"", "sh", "-noinput", "-boot",
                "start_clean", "-s", atom_to_list(?MODULE), "node_main", "-pa" | code_dirs()]}
    ]),
    S#state{nodes = Nodes#{Id => #node{port = Port, state = starting, life = Life}}, lives = Life}.

code_dirs() ->
    lists:usort([filename:dirname(filename:absname(code:which(Module)))
                 || Module <- [?MODULE, ?WRITER]]).

kill(Ids, #state{nodes = Nodes} = S) ->
    Ports = [(maps:get(Id, Nodes))#node.port || Id <- Ids],
    Pids = [[$\s, integer_to_list(Pid)] || Port <- Ports,
                                           {os_pid, Pid} <- [erlang:port_info(Port, os_pid)]],
    true = port_command(S#state.shell, ["kill -9", Pids, $\n]),
    Dead = lists:foldl(fun(Port, Sofar) -> drain(Port, Sofar) end, S, Ports),
    Killed = [{Id, maps:get(Id, Dead#state.nodes)} || Id <- Ids],
    Busy = [Id || {Id, #node{open = Open, answered = Answered}} <- Killed,
                  Open =/= [] orelse Answered =/= []],
    %% A node's savers take the keys in order: of those that it had not answered, the first ones are
    %% what it was at.
    Cut = [{N, {Id, Life}} || {Id, #node{open = Open, life = Life}} <- Killed,
                              N <- lists:usort(lists:sublist(Open, ?SAVERS))],
    Only = [{N, {Id, Life}} || {Id, #node{answered = Answered, life = Life}} <- Killed,
                               N <- lists:usort(Answered)],
    Counts = [{kills, length(Ids)}, {in_a_save, length(Busy)}, {cut_off, length(Cut)},
              {only_answered, length(Only)}, {tmp_left, length(stale(Dead))}],
    Left = Dead#state{nodes = maps:without(Ids, Dead#state.nodes), cut = Cut ++ Dead#state.cut,
                      only_answered = Only ++ Dead#state.only_answered},
    add_all(Counts, Left).

%% What it could still say counts.
drain(Port, S) ->
    Gone = receive {Port, {exit_status, _}} -> true after ?DEADLINE -> error(not_killed) end,
    drained(Port, Gone, S).

drained(Port, true, S) ->
    receive
        {Port, eof} -> true = port_close(Port), S;
        {Port, Message} -> drained(Port, true, heard(Port, Message, S))
    after ?DEADLINE -> error(no_end)
    end.

%% Temporary files that nobody holds the lock of.
stale(#state{root = Root}) ->
    {ok, Locks} = file:read_file("/proc/locks"),
    Tmps = filelib:wildcard("*.tmp", Root),
    Inodes = [element(12, Info)
              || Tmp <- Tmps, {ok, Info} <- [file:read_file_info(filename:join(Root, Tmp))]],
    [Inode || Inode <- Inodes,
              binary:match(Locks, list_to_binary(io_lib:format(":~b 0 EOF", [Inode]))) =:= nomatch].

%%% Looking

%% Both nodes say the same of every key; a key that was acknowledged is there, and with the payload
%% that it was first seen with; one that was not is there as a whole, or not at all.
verify(#state{fresh = Fresh, seen = Seen, cut = Cut, only_answered = Only,
              suspects = Suspects} = S) ->
    Old = maps:keys(Seen),
    Sample = [lists:nth(uniform(length(Old)), Old) || Old =/= [], _ <- lists:seq(1, 10)],
    Verified = verify(lists:usort(Fresh ++ Sample), S#state{fresh = []}),
    Verified#state{cut = [], only_answered = [],
                   suspects = [N || {N, _} <- Cut ++ Only] ++ Suspects}.

verify(Numbers, #state{nodes = Nodes, root = Root} = S) ->
    #{1 := Node1, 2 := Node2} = Nodes,
    [tell(Port, {load, Numbers}) || #node{port = Port} <- [Node1, Node2]],
    [{First, Said1}, {Second, Said2}] = [loaded(Node) || Node <- [Node1, Node2]],
    [error({nodes_differ, A, B}) || {A, B} <- lists:zip(First, Second), A =/= B],
    Next = lists:foldl(fun judge/2, S, First),
    Files = lists:sort(filelib:wildcard("*", Root)),
    Expected = lists:sort([name(N) || N <- maps:keys(Next#state.seen)]),
    Files =:= Expected orelse error({files, {Files -- Expected, Expected -- Files}}),
    Adoptions = lists:sum([maps:get(adoptions, Said) || Said <- [Said1, Said2]]),
    add(adopted, Adoptions, add(loads, 2 * length(Numbers), Next)).

judge({N, {ok, Whose}}, #state{seen = Seen, cut = Cut, only_answered = Only} = S) ->
    case Seen of
        #{N := Whose} ->
            S;
        #{N := Other} ->
            error({changed, N, Other, Whose});
        #{} ->
            There = [{What, length([N || lists:member({N, Whose}, Which)])}
                     || {What, Which} <- [{cut_off_there, Cut}, {only_answered_there, Only}]],
            Next = S#state{seen = Seen#{N => Whose}},
            add_all([{files, 1} | There], Next)
    end;
judge({N, miss}, #state{seen = Seen, acknowledged = Acknowledged, only_answered = Only} = S) ->
    Lost = maps:is_key(N, Seen) orelse maps:is_key(N, Acknowledged),
    Lost andalso error({lost, N}),
    case lists:keymember(N, 1, Only) of
        true -> S#state{missing = [N | S#state.missing]};
        false -> add(absent, 1, S)
    end;
judge({N, Other}, _S) ->
    error({load, N, Other}).

%% What was answered and is nowhere can be saved by either node.
save_missing(#state{missing = []} = S) ->
    S;
save_missing(#state{missing = Missing, fresh = Fresh} = S) ->
    Given = give(uniform(2), Missing, S#state{missing = [], fresh = Missing ++ Fresh}),
    #state{missing = []} = Saved = verify(settle(Given)),
    add(saved_again, length(Missing), Saved).

loaded(#node{port = Port}) ->
    receive
        {Port, {data, Data}} ->
            {loaded, Loaded, Info} = binary_to_term(Data),
            {Loaded, Info};
        {Port, Other} ->
            error({died_unasked, Other})
    after ?DEADLINE -> error({hung, Port})
    end.

%% Those whose saves were cut off, and others.
oracle(#state{root = Root, seen = Seen, suspects = Suspects} = S) ->
    First = [N || N <- lists:usort(Suspects), is_map_key(N, Seen)],
    Others = maps:keys(maps:without(First, Seen)),
    Files = up_to(?ORACLE_BYTES, [filename:join(Root, name(N)) || N <- First ++ shuffle(Others)]),
    ok = oracle_agrees(Files),
    add(checked, length(Files), S#state{suspects = []}).

up_to(Bytes, [File | Files]) when Bytes > 0 ->
    [File | up_to(Bytes - filelib:file_size(File), Files)];
up_to(_Bytes, _Files) -> [].

shuffle(List) ->
    [X || {_, X} <- lists:sort([{rand:uniform(), X} || X <- List])].

oracle_agrees([]) ->
    ok;
oracle_agrees(Files) ->
    {Some, Rest} = lists:split(min(50, length(Files)), Files),
    case run_command("python3", [os:getenv("KILL_ORACLE"), "check" | Some]) of
        {0, _} -> oracle_agrees(Rest);
        {_, Said} -> error({oracle, [Line || "BAD" ++ _ = Line <- string:split(Said, "\n", all)]})
    end.

%% One node deletes, and the other one finds that out.
next_stage(#state{seen = Seen, nodes = Nodes} = S) ->
    io:format("  ~b kills, ~b files~n", [count(kills, S), count(files, S)]),
    {_Kept, Delete} = lists:split(min(?KEPT, maps:size(Seen)), shuffle(maps:keys(Seen))),
    #{1 := #node{port = Port}} = Nodes,
    tell(Port, {delete, Delete}),
    Next = S#state{seen = maps:without(Delete, Seen),
                   acknowledged = maps:without(Delete, S#state.acknowledged)},
    receive {Port, {data, Deleted}} -> deleted = binary_to_term(Deleted) end,
    verify(lists:sublist(Delete, 50), Next).

%% All of them once more, by nodes that have just started.
finish(S0) ->
    S1 = oracle(S0),
    S2 = settle(start(2, start(1, kill([1, 2], S1)))),
    S3 = verify(maps:keys(S2#state.seen), S2),
    lists:foreach(fun(#node{port = Port}) -> port_close(Port) end, maps:values(S3#state.nodes)),
    S3.

%% A storm in which nobody was hit has proven nothing.
assert_not_idle(Kills, S) ->
    Hits = [{in_a_save, Kills div 3}, {absent, 1}, {adopted, 1}] ++
        [{tmp_left, 1} || os:getenv("KILL_NAMED") =/= false] ++
        case is_behind() of
            true -> [{What, 1} || What <- [only_answered_there, saved_again, flushed, full]];
            false -> [{cut_off_there, 1}]
        end,
    Missed = [{What, count(What, S)} || Kills >= 20, {What, Least} <- Hits, count(What, S) < Least],
    Missed =:= [] orelse error({hit_nothing, Missed}).

add(What, N, #state{counts = Counts} = S) ->
    S#state{counts = Counts#{What => maps:get(What, Counts, 0) + N}}.

add_all(Counts, S) ->
    lists:foldl(fun({What, N}, Sofar) -> add(What, N, Sofar) end, S, Counts).

count(What, #state{counts = Counts}) ->
    maps:get(What, Counts, 0).

table(S) ->
    [{What, count(What, S)} || What <- rows(is_behind())].

rows(false) ->
    [kills, held, in_a_save, cut_off, cut_off_there, killed_while_starting, tmp_left, files, saved,
     adopted, already_present, conflict, absent, checked, loads];
rows(true) ->
    [kills, held, in_a_save, only_answered, only_answered_there, saved_again, killed_while_starting,
     tmp_left, files, answered, adopted, already_present, flushed, full, absent, checked, loads].

print(Rows) ->
    [io:format("  ~-56s ~8b~n", [label(What), N]) || {What, N} <- Rows],
    ok.

label(seconds) -> "seconds";
label(kills) -> "kills";
label(held) -> "  while the other had a save in the middle: it succeeded";
label(in_a_save) -> "  of a node in the middle of its saves";
label(cut_off) -> "    saves cut off";
label(cut_off_there) -> "    of these, their file was published, and is whole";
label(only_answered) -> "    saves answered, and not flushed";
label(only_answered_there) -> "    of these, their file was published, and is whole";
label(saved_again) -> "    of these, nowhere, and saved by the next node";
label(killed_while_starting) -> "  of a node that was starting";
label(tmp_left) -> "  temporary files left behind, all swept by a start";
label(files) -> "files, one for each key, none lost, none changed";
label(saved) -> "  saves told {ok, Key}";
label(answered) -> "  saves told {ok, Key} behind their callers";
label(flushed) -> "  saves told either and confirmed by a flush: all there";
label(full) -> "  saves told max_concurrent: the pending set was full";
label(adopted) -> "    of these, by adopting a file, at least";
label(already_present) -> "  saves told already_present";
label(conflict) -> "  saves told conflict, within one node";
label(absent) -> "keys that nobody was told of, and that are nowhere";
label(checked) -> "files checked by the oracle";
label(loads) -> "loads, each byte compared, the same in both nodes".

%%% What a killed one runs

-spec node_main() -> no_return().
node_main() ->
    Port = open_port({fd, 3, 4}, [binary, {packet, 4}, eof]),
    Root = os:getenv("KILL_ROOT"),
    ok = logger:add_handler(?MODULE, ?MODULE, #{level => warning, config => #{port => Port}}),
    {ok, Noise} = file:read_file(os:getenv("KILL_NOISE")),
    Whose = {list_to_integer(os:getenv("KILL_NODE")), list_to_integer(os:getenv("KILL_LIFE"))},
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root, keyed_by => keyed_by()}),
    ok = erllama_cache_hooked_host:make_keys_of(keyed_by()),
    {ok, _} = ?WRITER:start_link((writer_config())#{host => erllama_cache_hooked_host}),
    {ok, Path} = erllama_cache_path:native(Root),
    Unnamed = erllama_cache_io_limit:run(fun(Turn) ->
        erllama_cache_nif:takes_unnamed(Turn, Path)
    end),
    tell(Port, {up, #{unnamed => Unnamed}}),
    serve(Port, Root, Whose, Noise).

writer_config() ->
    case is_behind() of
        true -> #{max_concurrent => ?RUNNING, write_behind => #{max => ?PENDING}};
        false -> #{max_concurrent => ?SAVERS + 1}
    end.

serve(Port, Root, Whose, Noise) ->
    receive
        {Port, {data, Data}} ->
            case binary_to_term(Data) of
                {save, Numbers} ->
                    ok = save_all(Port, Whose, list_to_tuple(Numbers), Noise),
                    tell(Port, done);
                {hold, N} ->
                    _ = spawn_link(fun() -> save_held(Port, Whose, N, Noise) end);
                let_go ->
                    held ! go;
                {load, Numbers} ->
                    Loaded = [{N, load(N, Noise)} || N <- Numbers],
                    tell(Port, {loaded, Loaded, nothing_held(Root)});
                {delete, Numbers} ->
                    _ = [ok = erllama_cache_store:delete(?STORE, key(N)) || N <- Numbers],
                    tell(Port, deleted)
            end,
            serve(Port, Root, Whose, Noise);
        {Port, eof} ->
            halt(0)
    end.

save_all(Port, Whose, Numbers, Noise) ->
    Next = atomics:new(1, []),
    Savers = [spawn_monitor(fun() -> save_next(Port, Whose, Numbers, Next, Noise) end)
              || _ <- lists:seq(1, ?SAVERS)],
    [receive {'DOWN', Monitor, process, Pid, Reason} -> normal = Reason end
     || {Pid, Monitor} <- Savers],
    _ = is_behind() andalso flush(Port),
    ok.

save_next(Port, Whose, Numbers, Next, Noise) ->
    case atomics:add_get(Next, 1, 1) of
        I when I =< tuple_size(Numbers) ->
            N = element(I, Numbers),
            Payload = payload(N, Whose, Noise),
            case is_behind() of
                true -> save_behind(Port, N, Payload, Noise);
                false -> tell(Port, {saved, N, save(cold, N, Payload)})
            end,
            save_next(Port, Whose, Numbers, Next, Noise);
        _ ->
            ok
    end.

save_behind(Port, N, Payload, Noise) ->
    case save(cold, N, Payload) of
        {error, max_concurrent} ->
            tell(Port, full),
            ok = flush(Port),
            save_behind(Port, N, Payload, Noise);
        Result ->
            tell(Port, {answered, N, Result}),
            %% From the answer on it can be loaded, whether there is a file or not.
            {ok, _} = load(N, Noise),
            ok
    end.

%% What was answered before it began is promised when it has returned.
flush(Port) ->
    Flush = erlang:unique_integer(),
    tell(Port, {flushing, Flush}),
    ok = ?WRITER:flush(infinity),
    tell(Port, {flushed, Flush}).

%% Until it is told to go on. For this reason a save is always in line.
save_held(Port, Whose, N, Noise) ->
    true = register(held, self()),
    Self = self(),
    Hook = fun() -> self() =:= Self andalso be_held(Port, N) end,
    Save = fun() -> save(evict, N, payload(N, Whose, Noise)) end,
    tell(Port, {let_go, N, erllama_cache_hooked_host:with_hook(Hook, Save)}).

be_held(Port, N) ->
    tell(Port, {held, N}),
    receive go -> ok end.

save(Reason, N, Payload) ->
    Key = key(N),
    case ?WRITER:save(?STORE, disk, (meta(N))#{save_reason := Reason}, Payload) of
        {ok, Key} -> ok;
        Other -> Other
    end.

load(N, Noise) ->
    Version = version(keyed_by()),
    case erllama_cache_store:load(?STORE, key(N)) of
        {ok, #{version := Version, tokens := <<N:32/little>>},
         <<Node:32, Life:32, _/binary>> = Payload} ->
            case payload(N, {Node, Life}, Noise) of
                Payload -> {ok, {Node, Life}};
                _ -> wrong_bytes
            end;
        {ok, _, _} -> wrong_bytes;
        Other -> Other
    end.

%% Between saves a node holds nothing, and it never had to replace a file: that would have been half
%% a file under a final name.
nothing_held(Root) ->
    ok = eventually(fun() -> open_files(Root) =:= [] end),
    #{current := 0, waiting := 0, inflight_bytes := 0, pending := 0, pending_bytes := 0,
      dropped := 0, replacements := 0, adoptions := Adoptions} = ?WRITER:info(),
    ok = eventually(fun() -> maps:get(reservations, erllama_cache_store:info(?STORE)) =:= 0 end),
    #{adoptions => Adoptions}.

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<1:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [N],
        prompt_text => integer_to_binary(N), context_size => 4096
    }.

key(N) ->
    {ok, Key} = erllama_cache_store:key(meta(N), #{keyed_by => keyed_by()}),
    Key.

%% What the keys of this storm are made of, and the version of its files.
keyed_by() ->
    case os:getenv("KILL_KEYED_BY") of
        "tokens" -> tokens;
        "text" -> text
    end.

version(tokens) -> 1;
version(text) -> 2.

name(N) ->
    filename:basename(erllama_cache_path:final("", key(N))).

%% Says whose it is, and no part of it is like another.
payload(N, {Node, Life} = Whose, Noise) ->
    Size = size(N, erlang:phash2({N, Whose}, 1 bsl 20)),
    At = erlang:phash2({at, N, Whose}, byte_size(Noise) - Size),
    <<Node:32, Life:32, N:64, (binary:part(Noise, At, Size))/binary>>.

%% One of each batch takes many slices, some are written in pieces or in one go, the others are what
%% one call of the library does.
size(N, Random) when N rem ?BATCH =:= 1 -> 1 bsl 20 + Random;
size(N, Random) when N rem 8 =:= 1 -> 65536 + Random rem (250 * 1024);
size(_N, Random) -> Random rem 20000.

%% What a start finds corrupt, or cannot look at, nobody has put there.
log(#{msg := {report, #{event := Event} = Report}}, #{config := #{port := Port}}) when
    Event =:= corrupt_file_removed; Event =:= file_skipped
->
    tell(Port, {trouble, Report});
log(#{level := Level} = Event, #{config := #{port := Port}}) when Level =:= error ->
    tell(Port, {trouble, Event});
log(_Event, _Config) ->
    ok.
