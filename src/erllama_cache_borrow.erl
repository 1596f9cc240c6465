%% Takes one file from a peer: reserves its key, receives it over a connection of its own, and
%% publishes it when its last byte is proven.
%%
%% The bytes do not go through the distribution channel, where a full buffer would suspend whoever
%% sends tokens. What the peer gets by that channel is a ticket that is good for one connection.
%%
%% @private
-module(erllama_cache_borrow).

-include("erllama_cache_store.hrl").

-export([run/4]).

%% Milliseconds for the peer's answer, for the connection, and for each piece.
-define(PATIENCE, 2000).
%% How much is received at a time.
-define(PIECE, 524288).
-define(TICKET_BYTES, 32).
%% Of a file, where no writer says otherwise.
-define(MODE, 8#600).

%% `failed' is the peer's fault, or that of the way to it; `error' is this store's.
-spec run(#config{}, erllama_cache_nif:key(), Size :: pos_integer(),
          {node(), erllama_cache_store:name()}) ->
    ok | {failed, term()} | {error, term()}.
run(#config{name = Name, tier = Tier} = Config, Key, Size, Peer) ->
    case erllama_cache_store_claim:reserve(Name, Tier, Key, Size) of
        {ok, Token} ->
            try receive_file(Config, Key, Size, Peer, Token) of
                ok ->
                    ok;
                Failure ->
                    ok = erllama_cache_store_claim:cancel(Name, Key, Token),
                    Failure
            catch
                Class:Reason:Stack ->
                    ok = erllama_cache_store_claim:cancel(Name, Key, Token),
                    erlang:raise(Class, Reason, Stack)
            end;
        %% Somebody has saved it since, or does so now.
        {error, already_present} ->
            ok;
        {error, _} = Error ->
            Error
    end.

receive_file(Config, Key, Size, {Node, Store}, Token) ->
    Ticket = crypto:strong_rand_bytes(?TICKET_BYTES),
    Args = [Store, Key, Ticket, self()],
    try erpc:call(Node, erllama_cache_lend, offer, Args, ?PATIENCE) of
        {ok, Size, Address, Port} ->
            connected(Config, Key, Size, Token, Ticket, Address, Port);
        %% Longer or shorter than a moment ago: of a file that nothing is reserved for.
        {ok, _Other, _Address, _Port} ->
            {failed, changed};
        {error, Reason} ->
            {failed, Reason}
    catch
        _Class:Reason -> {failed, Reason}
    end.

connected(Config, Key, Size, Token, Ticket, Address, Port) ->
    Options = [binary, {active, false}, {packet, raw}, {nodelay, true}, {buffer, ?PIECE}],
    case gen_tcp:connect(Address, Port, Options, ?PATIENCE) of
        {ok, Socket} ->
            try
                case gen_tcp:send(Socket, Ticket) of
                    ok -> import(Config, Key, Size, Token, Socket);
                    {error, Reason} -> {failed, Reason}
                end
            after
                gen_tcp:close(Socket)
            end;
        {error, Reason} ->
            {failed, Reason}
    end.

import(#config{path = Path} = Config, Key, Size, Token, Socket) ->
    Options = save_options(Config),
    Begin = fun(Turn) -> erllama_cache_nif:import_begin(Turn, Path, Key, Size, Options) end,
    case erllama_cache_io_limit:run(Begin) of
        {ok, Import} ->
            try
                pieces(Config, Key, Token, Socket, Import, Size, renew_at())
            after
                %% Drops nothing that is published.
                ok = erllama_cache_nif:import_abort(Import)
            end;
        {error, _} = Error ->
            Error
    end.

pieces(Config, Key, Token, _Socket, Import, 0, _RenewAt) ->
    publish(Config, Key, Token, Import);
pieces(#config{name = Name} = Config, Key, Token, Socket, Import, Left, RenewAt) ->
    case renewed(Name, Key, Token, RenewAt) of
        {ok, Next} ->
            case gen_tcp:recv(Socket, min(Left, ?PIECE), ?PATIENCE) of
                {ok, Piece} ->
                    Write = fun(Turn) -> erllama_cache_nif:import_write(Turn, Import, Piece) end,
                    case until_done(Write) of
                        ok ->
                            pieces(Config, Key, Token, Socket, Import, Left - byte_size(Piece),
                                   Next);
                        Error ->
                            blame(Error)
                    end;
                {error, Reason} ->
                    {failed, Reason}
            end;
        {error, _} = Error ->
            Error
    end.

publish(#config{name = Name}, Key, Token, Import) ->
    case until_done(fun(Turn) -> erllama_cache_nif:import_publish(Turn, Import) end) of
        {ok, _Outcome, Size, Length} ->
            %% Whoever has the key by now finds the file.
            _ = erllama_cache_store_claim:settle(Name, Key, Token, Size, Length),
            ok;
        Error ->
            blame(Error)
    end.

until_done(Slice) ->
    case erllama_cache_io_limit:run(Slice) of
        more -> until_done(Slice);
        Result -> Result
    end.

%% What came is not what it should be: the peer's fault. Everything else is this node's.
blame({error, {corrupt, _} = Reason}) -> {failed, Reason};
blame({error, unauthenticated}) -> {failed, unauthenticated};
blame({error, _} = Error) -> Error.

renew_at() ->
    erlang:monotonic_time(millisecond) + erllama_cache_host:renew_every().

renewed(Name, Key, Token, At) ->
    case erlang:monotonic_time(millisecond) < At of
        true ->
            {ok, At};
        false ->
            case erllama_cache_index:renew(Name, Key, Token) of
                ok -> {ok, renew_at()};
                {error, _} = Error -> Error
            end
    end.

%% As this node's writer makes files, if there is one.
save_options(#config{tier = Tier, secret = Secret}) ->
    {Mode, PageCache} = case erllama_cache_setup:find() of
        {ok, #{options := #{Tier := {OfWriter, _Digest, Keep, _Effort}}}} -> {OfWriter, Keep};
        error -> {?MODE, keep}
    end,
    {Mode, Secret, PageCache, helped}.
