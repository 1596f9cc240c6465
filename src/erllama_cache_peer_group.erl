%% Which stores lend each other files, and which of them has which keys.
%%
%% A store's server is a member of its group for as long as it lives: that is all the state there
%% is, and `pg' keeps it.
%%
%% @private
-module(erllama_cache_peer_group).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

-export([join/2, ask/2, look/3, size_here/2]).

%% The scope of pg.
-define(SCOPE, erllama_cache_peers).

%% Makes a store's server a member.
-spec join(none | atom(), pid()) -> ok.
join(none, _Server) ->
    ok;
join(Group, Server) ->
    %% Of the node, not of this store: the next one joins the same scope.
    case pg:start(?SCOPE) of
        {ok, _} -> ok;
        {error, {already_started, _}} -> ok
    end,
    pg:join(?SCOPE, Group, Server).

%% Who has which of these keys, and how long the files are.
-spec ask(#config{}, [erllama_cache_writer:key()]) ->
    [{node(), erllama_cache_store:name(), [{erllama_cache_writer:key(), Size :: pos_integer()}]}].
ask(_Config, []) ->
    [];
ask(#config{peers = none}, _Keys) ->
    [];
ask(#config{peers = Group, server = Server, peer_timeout = Timeout}, Keys) ->
    Members = pg:get_members(?SCOPE, Group),
    %% Nobody looks after the scope: whoever asks finds out that it has ended.
    ok = case lists:member(Server, Members) of
        true -> ok;
        false -> join(Group, Server)
    end,
    Nodes = lists:usort([node(Pid) || Pid <- Members, Pid =/= Server]),
    Answers = erpc:multicall(Nodes, ?MODULE, look, [Group, Keys, Server], Timeout),
    Found = [
        {Node, Name, Files}
     || {Node, {ok, Stores}} <- lists:zip(Nodes, Answers), is_list(Stores),
        {Name, Files} <- Stores, is_atom(Name), is_list(Files)
    ],
    %% In any order: not all are to take from the same one.
    [Each || {_, Each} <- lists:sort([{rand:uniform(), Each} || Each <- Found])].

%% Called by peers. Looks at the indices only.
-spec look(atom(), [erllama_cache_writer:key()], pid()) ->
    [{erllama_cache_store:name(), [{erllama_cache_writer:key(), Size :: pos_integer()}]}].
look(Group, Keys, Asker) ->
    [
        {Name, Found}
     || Pid <- pg:get_local_members(?SCOPE, Group), Pid =/= Asker,
        {registered_name, Name} <- [process_info(Pid, registered_name)],
        [_ | _] = Found <- [look_here(Name, Keys)]
    ].

look_here(Name, Keys) ->
    try
        [{Key, Size} || Key <- Keys, Size <- [size_here(Name, Key)], is_integer(Size)]
    catch
        %% It ends. The others of this node are there.
        exit:{noproc, _} -> []
    end.

%% How long the file of this key is, if the store has it.
-spec size_here(erllama_cache_store:name(), erllama_cache_nif:key()) -> pos_integer() | none.
size_here(Name, Key) ->
    case erllama_cache_index:row(Name, Key) of
        #row{state = present, size = Size} -> Size;
        _ -> none
    end.
