%% Several nodes: on one root, and one that saves for another.
-module(erllama_cache_nodes_SUITE).

-include_lib("stdlib/include/assert.hrl").
-include_lib("common_test/include/ct.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2]).
-export([one_loads_what_another_has_saved/1, one_finds_anothers_prefix/1,
         a_save_asked_of_another_node/1,
         all_save_the_same_keys/1, each_saves_its_own_payloads/1, none_sweeps_anothers_work/1]).

-import(erllama_cache_test_util, [files/1, file_of/2]).

-define(STORE, nodes_store).
-define(WRITER, erllama_cache_writer).

all() ->
    [one_loads_what_another_has_saved, one_finds_anothers_prefix, a_save_asked_of_another_node,
     all_save_the_same_keys, each_saves_its_own_payloads, none_sweeps_anothers_work].

init_per_testcase(Case, Config) ->
    ok = erllama_cache_nodes_util:distribute(Case),
    Root = filename:join(?config(priv_dir, Config), atom_to_list(Case)),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    Nodes = [start_node(Root) || _ <- [1, 2]],
    [{root, Root}, {nodes, Nodes} | Config].

end_per_testcase(_Case, Config) ->
    [ok = erllama_cache_nodes_util:stop(Node) || Node <- ?config(nodes, Config)],
    ok.

start_node(Root) ->
    {_, Node} = Started = erllama_cache_nodes_util:start(),
    ok = start_store(Node, Root),
    Args = [#{host => erllama_cache_store}],
    {ok, _} = erllama_cache_nodes_util:unlinked(Node, ?WRITER, start_link, Args),
    Started.

start_store(Node, Root) ->
    erllama_cache_nodes_util:start_store(Node, ?STORE, #{root => Root}).

nodes_of(Config) ->
    [Node || {_, Node} <- ?config(nodes, Config)].

meta(N) ->
    erllama_cache_test_util:meta([N]).

save(Node, N, Payload) ->
    erpc:call(Node, fun() -> save_here(N, Payload) end).

load(Node, Key) ->
    erpc:call(Node, erllama_cache_store, load, [?STORE, Key]).

one_loads_what_another_has_saved(Config) ->
    [A, B] = nodes_of(Config),
    {ok, Key} = save(A, 1, <<"payload">>),
    ?assertMatch({ok, _, <<"payload">>}, load(B, Key)),
    ?assertEqual({error, already_present}, save(B, 1, <<"payload">>)),
    ok = erpc:call(A, erllama_cache_store, delete, [?STORE, Key]),
    ?assertEqual(miss, load(B, Key)).

%% Once a load has found the file, or the store has started after it was saved.
one_finds_anothers_prefix(Config) ->
    [A, B] = nodes_of(Config),
    {ok, One} = save(A, 1, <<"payload">>),
    {ok, Two} = save(A, 2, <<"payload">>),
    ?assertEqual(miss, longest_prefix(B, [1, 7])),
    ?assertMatch({ok, _, <<"payload">>}, load(B, One)),
    ?assertEqual({ok, One, 1}, longest_prefix(B, [1, 7])),
    ok = erpc:call(B, gen_server, stop, [?STORE]),
    ok = start_store(B, ?config(root, Config)),
    ?assertEqual({ok, Two, 1}, longest_prefix(B, [2, 7])),
    ok = erpc:call(A, erllama_cache_store, delete, [?STORE, Two]),
    ?assertEqual({ok, Two, 1}, longest_prefix(B, [2, 7])),
    ?assertEqual(miss, load(B, Two)),
    ?assertEqual(miss, longest_prefix(B, [2, 7])).

longest_prefix(Node, Tokens) ->
    Meta = erllama_cache_test_util:meta(Tokens),
    erpc:call(Node, erllama_cache_store, longest_prefix, [?STORE, Meta]).

%% Over distribution, and in the background: the message finds its way back.
a_save_asked_of_another_node(Config) ->
    [A, B] = nodes_of(Config),
    Payload = rand:bytes(1 bsl 20),
    Self = self(),
    _ = spawn(A, fun() -> Self ! {saved, save(B, 2, Payload)} end),
    {ok, Key} = receive {saved, Result} -> Result end,
    ?assertMatch({ok, _, Payload}, load(A, Key)).

%% Each key once, whoever is first; and a load on every node gives the same.
all_save_the_same_keys(Config) ->
    Nodes = nodes_of(Config),
    Keys = lists:seq(1, 50),
    Self = self(),
    Savers = [
        spawn_monitor(Node, fun() ->
            Self ! {self(), [save_here(N, payload(N)) || N <- Keys]}
        end)
     || Node <- Nodes, _ <- [1, 2, 3]
    ],
    Results = lists:append([
        receive
            {Pid, Own} -> Own;
            {'DOWN', Monitor, process, Pid, Reason} when Reason =/= normal -> error(Reason)
        end
     || {Pid, Monitor} <- Savers
    ]),
    ?assertEqual([], [Other || Other <- Results, not is_fine(Other)]),
    Saved = lists:usort([Key || {ok, Key} <- Results]),
    ?assertEqual(length(Keys), length(Saved)),
    {ok, Files} = file:list_dir(?config(root, Config)),
    ?assertEqual(length(Keys), length(Files)),
    [
        begin
            {ok, Key} = erpc:call(Node, erllama_cache_store, key, [meta(N)]),
            Payload = payload(N),
            ?assertMatch({ok, _, Payload}, load(Node, Key))
        end
     || Node <- Nodes, N <- Keys
    ].

payload(N) ->
    binary:copy(<<N:32>>, 20000 + N).

is_fine({ok, _}) -> true;
is_fine({error, Reason}) -> Reason =:= already_present orelse Reason =:= conflict.

%% Both save the same keys at once, with payloads of their own. Each save succeeds in each node, and
%% both nodes see one payload.
each_saves_its_own_payloads(Config) ->
    Nodes = nodes_of(Config),
    Numbers = lists:seq(1, 40),
    Requests = [
        erpc:send_request(Node, fun() -> [save_here(N, payload_of(Node, N)) || N <- Numbers] end)
     || Node <- Nodes
    ],
    Keys = [
        begin
            {ok, Key} = erllama_cache_store:key(meta(N)),
            Key
        end
     || N <- Numbers
    ],
    [
        ?assert(Result =:= {ok, Key} orelse Result =:= {error, already_present})
     || Request <- Requests,
        {Key, Result} <- lists:zip(Keys, erpc:receive_response(Request, 50000))
    ],
    [InA, InB] = [[load(Node, Key) || Key <- Keys] || Node <- Nodes],
    Payloads = fun(Loaded) -> [Payload || {ok, _Info, Payload} <- Loaded] end,
    ?assertEqual(length(Numbers), length(Payloads(InA))),
    ?assertEqual(Payloads(InA), Payloads(InB)),
    [
        ?assert(lists:member(Payload, [payload_of(Node, N) || Node <- Nodes]))
     || {N, Payload} <- lists:zip(Numbers, Payloads(InA))
    ],
    Root = ?config(root, Config),
    ?assertEqual(lists:sort([filename:basename(file_of(Root, Key)) || Key <- Keys]), files(Root)).

save_here(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta(N), Payload).

payload_of(Node, N) ->
    binary:copy(atom_to_binary(Node), 1000 + N).

%% A store that starts while another node saves on its root leaves that save alone.
none_sweeps_anothers_work(Config) ->
    [A, B] = nodes_of(Config),
    Payload = rand:bytes(64 bsl 20),
    Self = self(),
    {Saver, Monitor} = spawn_monitor(A, fun() ->
        Self ! {self(), save_here(1, Payload)}
    end),
    Restarts = restart_until_saved(Saver, B, ?config(root, Config), 0),
    ?assert(Restarts > 0),
    {ok, Key} = receive
        {Saver, Result} -> Result;
        {'DOWN', Monitor, process, Saver, Reason} when Reason =/= normal -> error(Reason)
    end,
    ?assertMatch({ok, _, Payload}, load(A, Key)),
    ?assertMatch({ok, _, Payload}, load(B, Key)).

restart_until_saved(Saver, Node, Root, N) ->
    ok = erpc:call(Node, gen_server, stop, [?STORE]),
    ok = start_store(Node, Root),
    case erpc:call(node(Saver), erlang, is_process_alive, [Saver]) of
        true -> restart_until_saved(Saver, Node, Root, N + 1);
        false -> N + 1
    end.
