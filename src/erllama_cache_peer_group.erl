%% Which stores and tier servers lend each other files, and which of them has which keys.
%%
%% A store's server is a member of its group for as long as it lives, and so is the writer for the
%% tier servers of its host: that is all the state there is, and `pg' keeps it.
%%
%% @private
-module(erllama_cache_peer_group).

-include("erllama_cache_index.hrl").
-include("erllama_cache_peers.hrl").

-export([borrower/2, join/1, ask/2, look/4, size_here/2]).
-export_type([group/0, found/0]).

-type group() :: {stores | tiers, atom()}.
%% Stores of a group find each other whatever they are called, tier servers by their name.
-type found() :: {
    erllama_cache_host:tier_srv(), [{erllama_cache_nif:key(), Size :: pos_integer()}]
}.

%% The scope of pg.
-define(SCOPE, erllama_cache_peers).

%% The options `peers', `peer_timeout' and `peer_transport', for the calling process as the member.
%% Who has the files is in the record already.
-spec borrower(#{peers := none | atom(), atom() => term()}, Borrower) -> none | Borrower when
    Borrower :: #borrower{}.
borrower(#{peers := none}, _Borrower) ->
    none;
borrower(#{peers := Group, peer_timeout := Timeout, peer_transport := Transport}, Borrower) ->
    Kind = case Borrower of
        #borrower{host = erllama_cache_store} -> stores;
        _ -> tiers
    end,
    Borrower#borrower{
        group = {Kind, Group}, server = self(), timeout = Timeout, transport = Transport,
        flights = ets:new(flights, [public])
    }.

%% Makes its server a member.
-spec join(none | #borrower{}) -> ok.
join(none) ->
    ok;
join(#borrower{group = Group, server = Server}) ->
    %% Of the node, not of this store: the next one joins the same scope.
    case pg:start(?SCOPE) of
        {ok, _} -> ok;
        {error, {already_started, _}} -> ok
    end,
    pg:join(?SCOPE, Group, Server).

%% Who has which of these keys, and how long the files are.
-spec ask(none | #borrower{}, [erllama_cache_nif:key()]) ->
    [{node(), erllama_cache_host:tier_srv(), [{erllama_cache_nif:key(), Size :: pos_integer()}]}].
ask(none, _Keys) ->
    [];
ask(_Borrower, []) ->
    [];
ask(#borrower{name = Name, group = Group, server = Server, timeout = Timeout} = Borrower, Keys) ->
    Members = pg:get_members(?SCOPE, Group),
    %% Nobody looks after the scope: whoever asks finds out that it has ended.
    ok = case lists:member(Server, Members) of
        true -> ok;
        false -> join(Borrower)
    end,
    Nodes = lists:usort([node(Pid) || Pid <- Members, Pid =/= Server]),
    Lender = case Group of
        {stores, _} -> ?MODULE;
        {tiers, _} -> erllama_cache_peer_tier
    end,
    Answers = erpc:multicall(Nodes, Lender, look, [Group, Name, Keys, Server], Timeout),
    Found = [
        {Node, There, Files}
     || {Node, {ok, Found}} <- lists:zip(Nodes, Answers), is_list(Found),
        {There, Files} <- Found, is_atom(There), is_list(Files)
    ],
    %% In any order: not all are to take from the same one.
    [Each || {_, Each} <- lists:sort([{rand:uniform(), Each} || Each <- Found])].

%% Called by peers. Looks at the indices of the stores of the group.
-spec look(group(), erllama_cache_host:tier_srv(), [erllama_cache_nif:key()], Asker :: pid()) ->
    [found()].
look(Group, _Name, Keys, Asker) ->
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
