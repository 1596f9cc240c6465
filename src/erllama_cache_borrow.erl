%% Takes one file from a peer: reserves its key, receives it over a connection of its own, and
%% publishes it when its last byte is proven.
%%
%% The bytes do not go through the distribution channel, where a full buffer would suspend whoever
%% sends tokens. What the peer gets by that channel is a ticket that is good for one connection.
%%
%% @private
-module(erllama_cache_borrow).

-include("erllama_cache_store.hrl").

-export([run/3]).

%% Milliseconds for the peer's answer, for the connection, and for each piece.
-define(PATIENCE, 2000).
%% All of a file has so long besides, at this many bytes a millisecond: 4 MiB a second.
-define(SLOWEST, 4194).
%% How much is received at a time.
-define(PIECE, 524288).
-define(TICKET_BYTES, 32).
%% Of a file, where no writer says otherwise.
-define(MODE, 8#600).

%% Who is asked, for what, and until when.
-record(loan, {
    config :: #config{},
    key :: erllama_cache_nif:key(),
    token :: erllama_cache_host:token(),
    socket :: gen_tcp:socket(),
    import :: reference(),
    %% Monotonic milliseconds: of the whole, and of the next renewal of the reservation.
    deadline :: integer(),
    renew_at :: integer()
}).

%% `failed' is the peer's fault, or that of the way to it; `error' is this store's.
-spec run(#config{}, erllama_cache_nif:key(), {node(), erllama_cache_store:name()}) ->
    {ok, Size :: pos_integer()} | already_present | {failed, term()} | {error, term()}.
run(Config, Key, {Node, Store}) ->
    Ticket = crypto:strong_rand_bytes(?TICKET_BYTES),
    Args = [Store, Key, Ticket, self()],
    try erpc:call(Node, erllama_cache_lend, offer, Args, ?PATIENCE) of
        {ok, Size, Address, Port} when is_integer(Size), Size > 0, Size < 1 bsl 63 ->
            %% Only now: room is made for what is offered.
            reserved(Config, Key, Size, Ticket, Address, Port);
        {error, Reason} ->
            {failed, Reason};
        _ ->
            {failed, bad_answer}
    catch
        _Class:Reason -> {failed, Reason}
    end.

reserved(#config{name = Name, tier = Tier} = Config, Key, Size, Ticket, Address, Port) ->
    case erllama_cache_store_claim:reserve(Name, Tier, Key, Size) of
        {ok, Token} ->
            try connected(Config, Key, Size, Token, Ticket, Address, Port) of
                ok ->
                    {ok, Size};
                Failure ->
                    ok = erllama_cache_store_claim:cancel(Name, Key, Token),
                    Failure
            catch
                Class:Reason:Stack ->
                    ok = erllama_cache_store_claim:cancel(Name, Key, Token),
                    erlang:raise(Class, Reason, Stack)
            end;
        %% Somebody has saved it since.
        {error, already_present} ->
            already_present;
        {error, _} = Error ->
            Error
    end.

connected(Config, Key, Size, Token, Ticket, Address, Port) ->
    Options = [binary, {active, false}, {packet, raw}, {nodelay, true}, {buffer, ?PIECE}],
    try gen_tcp:connect(Address, Port, Options, ?PATIENCE) of
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
    catch
        %% No address, no port.
        _Class:Reason -> {failed, Reason}
    end.

import(#config{path = Path} = Config, Key, Size, Token, Socket) ->
    Options = save_options(Config),
    Begin = fun(Turn) -> erllama_cache_nif:import_begin(Turn, Path, Key, Size, Options) end,
    case erllama_cache_io_limit:run(Begin) of
        {ok, Import} ->
            Loan = #loan{
                config = Config, key = Key, token = Token, socket = Socket, import = Import,
                deadline = now_ms() + ?PATIENCE + Size div ?SLOWEST, renew_at = renew_at()
            },
            try
                pieces(Loan, Size)
            after
                %% Drops nothing that is published.
                ok = erllama_cache_nif:import_abort(Import)
            end;
        {error, _} = Error ->
            Error
    end.

pieces(Loan, 0) ->
    publish(Loan);
pieces(#loan{socket = Socket, deadline = Deadline, import = Import} = Loan, Left) ->
    Patience = max(0, min(?PATIENCE, Deadline - now_ms())),
    case gen_tcp:recv(Socket, min(Left, ?PIECE), Patience) of
        {ok, Piece} ->
            Write = fun(Turn) -> erllama_cache_nif:import_write(Turn, Import, Piece) end,
            case in_slices(Write, Loan) of
                {ok, Renewed} -> pieces(Renewed, Left - byte_size(Piece));
                {Failure, _} -> blame(Failure)
            end;
        {error, Reason} ->
            {failed, Reason}
    end.

publish(#loan{config = #config{name = Name}, key = Key, token = Token, import = Import} = Loan) ->
    case in_slices(fun(Turn) -> erllama_cache_nif:import_publish(Turn, Import) end, Loan) of
        {{ok, _Outcome, Size, Length}, _} ->
            %% Whoever has the key by now finds the file.
            _ = erllama_cache_store_claim:settle(Name, Key, Token, Size, Length),
            ok;
        {Failure, _} ->
            blame(Failure)
    end.

%% The reservation is renewed in time, however long the disk takes.
in_slices(Slice, Loan) ->
    case renewed(Loan) of
        {ok, Renewed} ->
            case erllama_cache_io_limit:run(Slice) of
                more -> in_slices(Slice, Renewed);
                Result -> {Result, Renewed}
            end;
        {error, _} = Error ->
            {Error, Loan}
    end.

renewed(#loan{renew_at = At, config = #config{name = Name}, key = Key, token = Token} = Loan) ->
    case now_ms() < At of
        true ->
            {ok, Loan};
        false ->
            case erllama_cache_index:renew(Name, Key, Token) of
                ok -> {ok, Loan#loan{renew_at = renew_at()}};
                {error, _} = Error -> Error
            end
    end.

%% What came is not what it should be: the peer's fault. Everything else is this node's.
blame({error, {corrupt, _} = Reason}) -> {failed, Reason};
blame({error, unauthenticated}) -> {failed, unauthenticated};
blame({error, _} = Error) -> Error.

renew_at() ->
    now_ms() + erllama_cache_host:renew_every().

now_ms() ->
    erlang:monotonic_time(millisecond).

%% As this node's writer makes files, if there is one.
save_options(#config{tier = Tier, secret = Secret}) ->
    {Mode, PageCache} = case erllama_cache_setup:find() of
        {ok, #{options := #{Tier := {OfWriter, _Digest, Keep, _Effort}}}} -> {OfWriter, Keep};
        error -> {?MODE, keep}
    end,
    {Mode, Secret, PageCache, helped}.
