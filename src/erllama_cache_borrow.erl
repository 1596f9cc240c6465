%% Takes one file from a peer: reserves its key as a save does, receives the file, publishes it when
%% its last byte is proven, and announces it.
%%
%% The bytes have a connection of their own: in the distribution channel, a full buffer would
%% suspend whoever sends tokens. They go from the system's buffers into the file without coming into
%% this node's memory. What the peer gets by the distribution channel is a ticket that is good for
%% one connection. Over TLS they come in pieces, for the VM decrypts them. Where no second port may
%% be opened, they do come by the distribution channel, two pieces at a time, which fill no buffer.
%%
%% @private
-module(erllama_cache_borrow).

-include("erllama_cache_peers.hrl").

-export([run/3]).

%% Milliseconds for the peer's answer, for the connection, and for each piece.
-define(PATIENCE, 2000).
%% All of a file has so long besides, at this many bytes a millisecond: 4 MiB a second.
-define(SLOWEST, 4194).
%% How much is decrypted at a time.
-define(PIECE, 262144).
%% How many pieces are on the way through the distribution channel.
-define(CREDIT, 2).
-define(TICKET_BYTES, 32).
%% Of a file, where no writer says otherwise.
-define(MODE, 8#600).

%% Who is asked, for what, and until when.
-record(loan, {
    borrower :: #borrower{},
    key :: erllama_cache_nif:key(),
    token :: erllama_cache_host:token(),
    import :: reference() | undefined,
    %% Monotonic milliseconds: of the whole, and of the next renewal of the reservation.
    deadline :: integer(),
    renew_at :: integer()
}).

%% How a peer's file comes: by a connection, for which there is a ticket, or from a process.
-type way() ::
    {tcp | tls, node(), inet:ip_address(), inet:port_number(), Ticket :: binary()} | pid().

%% `failed' is the peer's fault; `unreachable', that of the way to it; `error' is this node's.
-spec run(#borrower{}, erllama_cache_nif:key(), {node(), erllama_cache_host:tier_srv()}) ->
    {ok, Size :: pos_integer()} | already_present | {failed | unreachable | error, term()}.
run(Borrower, Key, Peer) ->
    case offer(Borrower, Key, Peer) of
        {ok, Size, Way} -> reserved(Borrower, Key, Peer, Size, Way);
        {_, _} = Failed -> Failed
    end.

-spec offer(#borrower{}, erllama_cache_nif:key(), {node(), erllama_cache_host:tier_srv()}) ->
    {ok, Size :: pos_integer(), way()} | {failed | unreachable, term()}.
offer(#borrower{transport = distribution}, Key, {Node, Store}) ->
    case asked(Node, offer_pieces, [Store, Key, self()]) of
        {ok, Size, Sender, pieces} when is_pid(Sender) -> {ok, Size, Sender};
        {_, _} = Failed -> Failed;
        _ -> {failed, bad_answer}
    end;
offer(#borrower{transport = Transport} = Borrower, Key, {Node, Store} = Peer) ->
    Ticket = crypto:strong_rand_bytes(?TICKET_BYTES),
    case asked(Node, offer, [Transport, Store, Key, Ticket, self()]) of
        {ok, Size, Address, Port} ->
            {ok, Size, {Transport, Node, Address, Port, Ticket}};
        %% Distribution is not over plain TCP.
        {failed, no_address} when Transport =:= tcp ->
            offer(Borrower#borrower{transport = distribution}, Key, Peer);
        {_, _} = Failed ->
            Failed
    end.

%% What a peer says that offers the file, if that is what an offer is like.
asked(Node, Function, Args) ->
    try erpc:call(Node, erllama_cache_lend, Function, Args, ?PATIENCE) of
        {ok, Size, _, _} = Offer when is_integer(Size), Size > 0, Size < 1 bsl 63 -> Offer;
        {error, Reason} -> {failed, Reason};
        _ -> {failed, bad_answer}
    catch
        _Class:Reason -> {unreachable, Reason}
    end.

%% Only now: room is made for what is offered.
reserved(#borrower{host = Host, name = Name, tier = Tier} = Borrower, Key, Peer, Size, Way) ->
    Begun = now_ms(),
    case Host:reserve(Name, Tier, Key, Size) of
        {ok, Token} ->
            try received(Borrower, Key, Token, {Peer, Size, Way}, Begun) of
                %% From here on nothing is to be undone, whatever the host says or raises.
                {published, What} -> announced(Borrower, Key, Token, What);
                Failure ->
                    ok = Host:cancel(Name, Key, Token),
                    Failure
            catch
                Class:Reason:Stack ->
                    ok = cancel_after_exception(Borrower, Key, Token),
                    erlang:raise(Class, Reason, Stack)
            end;
        %% Somebody has saved it since.
        {error, already_present} ->
            already_present;
        {error, _} = Error ->
            Error
    end.

%% The caller has to see the first exception.
cancel_after_exception(#borrower{host = Host, name = Name}, Key, Token) ->
    try
        Host:cancel(Name, Key, Token)
    catch
        _:_ -> ok
    end.

announced(#borrower{host = Host, name = Name, root = Root}, Key, Token, {Size, Header, Content}) ->
    case Host:mark_published(Name, Key, Token, Root) of
        ok ->
            case Host:announce(Name, Key, Token, Size, Header, Content) of
                ok -> {ok, Size};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% First the room on the disk, for which a turn is waited for, then the connection.
received(#borrower{path = Path} = Borrower, Key, Token, {_Peer, Size, _Way} = Offer, Begun) ->
    Options = save_options(Borrower),
    Loan = #loan{
        borrower = Borrower, key = Key, token = Token, deadline = deadline(Size),
        renew_at = renew_at()
    },
    Begin = fun(Turn) -> erllama_cache_nif:import_begin(Turn, Path, Key, Size, Options) end,
    case in_slices(Begin, Loan) of
        {{ok, Import}, Renewed} ->
            try
                imported(Renewed#loan{import = Import}, Offer, now_ms() - Begun)
            after
                %% Drops nothing that is published.
                ok = erllama_cache_nif:import_abort(Import)
            end;
        {{error, _} = Error, _} ->
            Error
    end.

imported(#loan{borrower = Borrower, key = Key} = Loan, {_Peer, Size, _Way} = Offer, Waited) ->
    case standing(Borrower, Key, Offer, Waited) of
        {ok, Way} -> by_way(connect(Way), Loan, Size);
        {_, _} = Failed -> Failed
    end.

%% An offer stands for as long as a peer has patience. To evict what is in the way, and to get a
%% turn, may take longer.
standing(_Borrower, _Key, {_Peer, _Size, Way}, Waited) when Waited < ?PATIENCE div 2 ->
    {ok, Way};
standing(Borrower, Key, {Peer, Size, Way}, Waited) ->
    case offer(Borrower, Key, Peer) of
        {ok, Size, Another} -> {ok, Another};
        {ok, _, _} -> {failed, size_changed};
        %% Perhaps by the first offer, which may stand a little longer.
        {failed, busy} when Waited < ?PATIENCE -> {ok, Way};
        {_, _} = Failed -> Failed
    end.

by_way({ok, Source}, Loan, Size) ->
    try
        from(Source, Loan#loan{deadline = deadline(Size)}, Size)
    after
        close(Source)
    end;
by_way({error, Reason}, _, _) when Reason =:= emfile; Reason =:= enfile; Reason =:= enobufs ->
    {error, Reason};
by_way({error, Reason}, _, _) ->
    {unreachable, Reason}.

deadline(Size) ->
    now_ms() + ?PATIENCE + Size div ?SLOWEST.

connect({tcp, _Node, Address, Port, Ticket}) ->
    connect(Address, Port, Ticket);
connect({tls, Node, Address, Port, Ticket}) ->
    connect_securely(Node, Address, Port, Ticket);
connect(Sender) when is_pid(Sender) ->
    {ok, Sender}.

close({tls, Socket}) -> ssl:close(Socket);
close(Sender) when is_pid(Sender) -> ok;
close(Socket) -> socket:close(Socket).

connect(Address, Port, Ticket) ->
    Family = case Address of {_, _, _, _} -> inet; _ -> inet6 end,
    case socket:open(Family, stream, tcp) of
        {ok, Socket} ->
            case show_ticket(Socket, #{family => Family, addr => Address, port => Port}, Ticket) of
                ok ->
                    {ok, Socket};
                {error, _} = Error ->
                    _ = socket:close(Socket),
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

show_ticket(Socket, Peer, Ticket) ->
    try socket:connect(Socket, Peer, ?PATIENCE) of
        ok ->
            case socket:send(Socket, Ticket, ?PATIENCE) of
                {error, {Reason, _Rest}} -> {error, Reason};
                Result -> Result
            end;
        {error, _} = Error ->
            Error
    catch
        %% No address, no port.
        _Class:Reason -> {error, Reason}
    end.

connect_securely(Node, Address, Port, Ticket) ->
    Options = [binary, {active, false}, {packet, raw}, {nodelay, true}],
    try gen_tcp:connect(Address, Port, Options, ?PATIENCE) of
        {ok, Socket} ->
            case erllama_cache_peer_tls:connect(Socket, Node, ?PATIENCE) of
                {ok, Secure} ->
                    case ssl:send(Secure, Ticket) of
                        ok -> {ok, {tls, Secure}};
                        {error, _} = Error -> ok = gen_tcp:close(Socket), Error
                    end;
                {error, _} = Error ->
                    ok = gen_tcp:close(Socket),
                    Error
            end;
        {error, _} = Error ->
            Error
    catch
        _Class:Reason -> {error, Reason}
    end.

from(Sender, Loan, Size) when is_pid(Sender) ->
    ok = give_credit(Sender, ?CREDIT),
    pieces(Sender, Loan, Size);
from({tls, _} = Source, Loan, Size) ->
    pieces(Source, Loan, Size);
from(Socket, Loan, _Size) ->
    {ok, Number} = socket:getopt(Socket, {otp, fd}),
    case erllama_cache_nif:import_source(Loan#loan.import, Number) of
        ok -> stream(Socket, Loan);
        {error, _} = Error -> Error
    end.

%% What comes by a connection. Nobody waits for it in a turn.
stream(Socket, #loan{import = Import} = Loan) ->
    case in_slices(fun(Turn) -> erllama_cache_nif:import_receive(Turn, Import) end, Loan) of
        {ok, Renewed} ->
            publish(Renewed);
        {idle, Renewed} ->
            case next_bytes(Socket, patience(Renewed)) of
                ok -> stream(Socket, Renewed);
                {error, Reason} -> {failed, Reason}
            end;
        {closed, _} ->
            {failed, closed};
        {Failure, _} ->
            blame(Failure)
    end.

%% Waits for them, and leaves them where they are.
next_bytes(_Socket, Patience) when Patience =< 0 ->
    {error, timeout};
next_bytes(Socket, Patience) ->
    case socket:recv(Socket, 1, [peek], Patience) of
        {ok, _} -> ok;
        {error, {Reason, _}} -> {error, Reason};
        {error, _} = Error -> Error
    end.

%% What comes by the distribution channel, or is decrypted here.
pieces(_Source, Loan, 0) ->
    publish(Loan);
pieces(Source, #loan{import = Import} = Loan, Left) ->
    case next_piece(Source, Left, patience(Loan)) of
        {ok, Piece} ->
            ok = give_credit(Source, 1),
            Write = fun(Turn) -> erllama_cache_nif:import_write(Turn, Import, Piece) end,
            case in_slices(Write, Loan) of
                {ok, Renewed} -> pieces(Source, Renewed, Left - byte_size(Piece));
                {Failure, _} -> blame(Failure)
            end;
        {error, Reason} ->
            {failed, Reason}
    end.

%% Until the next byte comes. Not even what has come already is taken when there is no time left:
%% who sends byte by byte has no end.
patience(#loan{deadline = Deadline}) ->
    min(?PATIENCE, Deadline - now_ms()).

next_piece(_Source, _Left, Patience) when Patience =< 0 ->
    {error, timeout};
next_piece({tls, Socket}, Left, Patience) ->
    ssl:recv(Socket, min(Left, ?PIECE), Patience);
next_piece(Sender, Left, Patience) ->
    receive
        {Sender, piece, <<_, _/binary>> = Piece} when byte_size(Piece) =< Left -> {ok, Piece};
        {Sender, piece, _EmptyOrTooMuch} -> {error, bad_answer}
    after Patience ->
        {error, timeout}
    end.

give_credit(Sender, Pieces) when is_pid(Sender) ->
    Sender ! {self(), credit, Pieces},
    ok;
give_credit({tls, _}, _Pieces) ->
    ok.

publish(#loan{import = Import} = Loan) ->
    case in_slices(fun(Turn) -> erllama_cache_nif:import_publish(Turn, Import) end, Loan) of
        {{ok, Size, Header, Content}, _} -> {published, {Size, Header, Content}};
        {Failure, _} -> blame(Failure)
    end.

%% The reservation is renewed in time, however long the disk takes or the turn is waited for. The
%% peer's time does not run meanwhile.
in_slices(Slice, #loan{deadline = Deadline} = Loan) ->
    Begun = now_ms(),
    {Result, Renewed} = sliced(Slice, Loan),
    {Result, Renewed#loan{deadline = Deadline + now_ms() - Begun}}.

sliced(Slice, Loan) ->
    case renewed(Loan) of
        {ok, Renewed} ->
            Check = fun() -> check(Renewed) end,
            case erllama_cache_io_limit:run(Slice, erllama_cache_host:renew_every(), Check) of
                more -> sliced(Slice, Renewed);
                {gave_up, Lost} -> {Lost, Renewed};
                Result -> {Result, Renewed}
            end;
        {error, _} = Error ->
            {Error, Loan}
    end.

renewed(#loan{renew_at = At} = Loan) ->
    case now_ms() < At orelse check(Loan) of
        true -> {ok, Loan};
        ok -> {ok, Loan#loan{renew_at = renew_at()}};
        {error, _} = Error -> Error
    end.

check(#loan{borrower = #borrower{host = Host, name = Name}, key = Key, token = Token}) ->
    Host:check(Name, Key, Token).

%% What came is not what it should be: the peer's fault. Everything else is this node's.
blame({error, {corrupt, _} = Reason}) -> {failed, Reason};
blame({error, unauthenticated}) -> {failed, unauthenticated};
blame({error, _} = Error) -> Error.

renew_at() ->
    now_ms() + erllama_cache_host:renew_every().

now_ms() ->
    erlang:monotonic_time(millisecond).

%% As this node's writer makes files, if there is one.
save_options(#borrower{tier = Tier, secret = Secret}) ->
    {Mode, PageCache} = case erllama_cache_setup:find() of
        {ok, #{options := #{Tier := {OfWriter, _Digest, Keep, _Effort}}}} -> {OfWriter, Keep};
        error -> {?MODE, keep}
    end,
    {Mode, Secret, PageCache, helped}.
