%% Other nodes of this machine, for suites that need several.
-module(erllama_cache_nodes_util).

-export([distribute/1, start/0, start_apart/1, stop/1, start_store/3, unlinked/4]).

-export_type([started/0]).

-type started() :: {peer:server_ref(), node()}.

-spec distribute(Name :: atom()) -> ok.
distribute(Name) ->
    _ = os:cmd("epmd -daemon"),
    %% It returns before it listens.
    erllama_cache_test_util:eventually(fun() -> element(1, net_adm:names()) =:= ok end),
    case is_alive() of
        true ->
            ok;
        false ->
            Whole = list_to_atom(lists:concat([Name, "_", os:getpid()])),
            {ok, _} = net_kernel:start([Whole, shortnames]),
            ok
    end.

%% A node that is connected with this one, and has the modules of the application and of the tests.
-spec start() -> started().
start() ->
    {ok, Peer, Node} = peer:start(#{
        name => peer:random_name(), connection => standard_io,
        args => ["-setcookie", atom_to_list(erlang:get_cookie()) | paths()]
    }),
    true = net_kernel:connect_node(Node),
    {Peer, Node}.

%% A node with these arguments that is connected with no other: it is asked by peer:call/4.
-spec start_apart([string()]) -> started().
start_apart(Args) ->
    {ok, Peer, Node} = peer:start(#{
        name => peer:random_name(), connection => standard_io,
        args => ["-setcookie", "of_nodes_apart" | Args] ++ paths()
    }),
    {Peer, Node}.

%% A node that the test has killed has stopped already.
-spec stop(started()) -> ok.
stop({Peer, _Node}) ->
    try
        peer:stop(Peer)
    catch
        exit:_ -> ok
    end.

%% The application, by a module that cover may not compile, and this module for the functions that
%% are sent.
paths() ->
    lists:append([
        ["-pa", filename:absname(filename:dirname(code:which(Module)))]
     || Module <- [erllama_cache_nif, ?MODULE]
    ]).

-spec start_store(node(), erllama_cache_store:name(), erllama_cache_store:options()) -> ok.
start_store(Node, Name, Options) ->
    {ok, _} = unlinked(Node, erllama_cache_store, start_link, [Name, Options]),
    ok.

%% The process that erpc makes ends with the call, and what is linked to it with it.
-spec unlinked(node(), module(), atom(), list()) -> term().
unlinked(Node, Module, Function, Args) ->
    erpc:call(Node, fun() ->
        Self = self(),
        Starter = spawn(fun() ->
            Self ! {self(), apply(Module, Function, Args)},
            receive stop -> ok end
        end),
        receive {Starter, Result} -> Result end
    end).
