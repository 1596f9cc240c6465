%% The tier servers of the writer's host, as those who lend and borrow: inside erllama there is no
%% store, so the writer is the member of the group, and a file is there if its name is in the root.
%%
%% A tier server has the same name on all nodes that lend each other its files.
%%
%% @private
-module(erllama_cache_peer_tier).

-include_lib("kernel/include/file.hrl").
-include("erllama_cache_peers.hrl").

-export([setup/2, borrower/2, look/4, lender/1]).

%% What a writer's configuration says of peers, for any of its host's tier servers. The calling
%% process is the member.
-spec setup(#{host := module(), atom() => term()}, none | erllama_cache_nif:secret()) ->
    none | #borrower{}.
setup(#{host := erllama_cache_store}, _Secret) ->
    %% Each store has its own.
    none;
setup(#{host := Host} = Config, Secret) ->
    Borrower = erllama_cache_peer_group:borrower(Config, #borrower{host = Host, secret = Secret}),
    ok = erllama_cache_peer_group:join(Borrower),
    Borrower.

%% The same for one of them. Exits when there is no such tier server.
-spec borrower(erllama_cache_host:tier_srv(), erllama_cache_host:tier()) ->
    {ok, none | #borrower{}} | {error, term()}.
borrower(TierSrv, Tier) ->
    case erllama_cache_setup:get(erllama_cache_reader, fetch, [TierSrv]) of
        #{borrower := none} ->
            {ok, none};
        #{borrower := #borrower{host = Host} = Borrower} ->
            case erllama_cache_host:locate(Host, TierSrv) of
                {ok, Root, Path} ->
                    {ok, Borrower#borrower{name = TierSrv, tier = Tier, root = Root, path = Path}};
                {error, _} = Error ->
                    Error
            end
    end.

%% Called by peers. Which of these keys have a file in the root of a tier server that is lent.
-spec look(erllama_cache_peer_group:group(), erllama_cache_host:tier_srv(),
           [erllama_cache_nif:key()], Asker :: pid()) ->
    [erllama_cache_peer_group:found()].
look(_Group, TierSrv, Keys, _Asker) ->
    case lender(TierSrv) of
        #borrower{path = Path} ->
            [{TierSrv, [{Key, Size} || Key <- Keys, {ok, Size} <- [size(Path, Key)]]}];
        none ->
            []
    end.

size(Path, Key) ->
    case file:read_link_info(erllama_cache_path:final(Path, Key), [raw]) of
        {ok, #file_info{type = regular, size = Size}} -> {ok, Size};
        _ -> none
    end.

%% The tier server of this name, if its files are lent.
-spec lender(erllama_cache_host:tier_srv()) -> none | #borrower{}.
lender(TierSrv) ->
    try borrower(TierSrv, disk) of
        {ok, Borrower} -> Borrower;
        {error, _} -> none
    catch
        %% Neither it nor a writer runs here.
        exit:_ -> none
    end.
