%% Lends one file to a peer: offers a connection that is good for a ticket, once, and sends the file
%% by the system's `sendfile', without bringing it into this node's memory; or over TLS, in pieces.
%%
%% Lending is bounded: a node that is asked for more at a time says so, and its peer tries another.
%%
%% @private
-module(erllama_cache_lend).

-include_lib("kernel/include/file.hrl").
-include("erllama_cache_peers.hrl").

-export([offer/5, offer_pieces/3, setup/0]).

%% Files that are lent at a time.
-define(MAX_LENT, 8).
%% Milliseconds until the peer connects and shows its ticket, and for each piece.
-define(PATIENCE, 2000).
%% Of those, for a connection to show its ticket: a stranger's may say nothing.
-define(PATIENCE_WITH_ONE, 500).
%% How much is sent between two looks at whether the peer takes it.
-define(PIECE, 524288).
%% The same through the distribution channel.
-define(MESSAGE, 262144).

%% Makes the slots for lending, once in the library's life.
-spec setup() -> ok.
setup() ->
    Before = persistent_term:get(?MODULE, undefined),
    New = fun() -> erllama_cache_nif:semaphore_new(?MAX_LENT) end,
    persistent_term:put(?MODULE, erllama_cache_successor:inherit(Before, New)).

%% Called by a peer. The file stays open, whatever becomes of its name. Errors: `gone', `busy',
%% `transport', this node lends in another way only, and POSIX reasons.
-spec offer(tcp | tls, erllama_cache_host:tier_srv(), erllama_cache_nif:key(), Ticket :: binary(),
            pid()) ->
    {ok, Size :: pos_integer(), inet:ip_address(), inet:port_number()} | {error, term()}.
offer(Transport, Store, Key, Ticket, Borrower) ->
    answer_of(fun(Asker) ->
        Borrowing = monitor(process, Borrower),
        Watcher = self(),
        Loan = {Transport, Store, Key, Ticket, node(Borrower)},
        Sender = spawn_link(fun() -> lend(Watcher, Loan) end),
        watch(Sender, Asker, Borrowing)
    end).

%% What a new process sends its asker before it goes on.
answer_of(Fun) ->
    Asker = self(),
    {Pid, Monitor} = spawn_monitor(fun() -> Fun(Asker) end),
    receive
        {Pid, Answer} ->
            true = demonitor(Monitor, [flush]),
            Answer;
        {'DOWN', Monitor, process, Pid, Reason} ->
            {error, Reason}
    end.

%% Until all is sent, or the borrower has ended or takes nothing for too long. With the sender end
%% the file, the sockets and its slot.
watch(Sender, Asker, Borrowing) ->
    receive
        {Sender, offered, Answer} ->
            Asker ! {self(), Answer},
            watch(Sender, Asker, Borrowing);
        {Sender, went_on} ->
            watch(Sender, Asker, Borrowing);
        {Sender, done} ->
            ok;
        {'DOWN', Borrowing, process, _Borrower, _Reason} ->
            stop(Sender)
    after ?PATIENCE ->
        stop(Sender)
    end.

stop(Sender) ->
    true = unlink(Sender),
    true = exit(Sender, kill).

%% File and sockets belong to the process that opened them, and end with it.
lend(Watcher, {Transport, Store, Key, Ticket, Node}) ->
    case prepare(Transport, Store, Key, Node) of
        {ok, File, Size, Listen, {Address, Port}} ->
            Watcher ! {self(), offered, {ok, Size, Address, Port}},
            _ = serve(Watcher, {Transport, Listen}, File, Size, Ticket),
            Watcher ! {self(), done};
        {error, _} = Error ->
            Watcher ! {self(), offered, Error},
            Watcher ! {self(), done}
    end.

prepare(Transport, Store, Key, Node) ->
    case take(Transport, Store, Key) of
        {ok, File, Size} -> listen(address_towards(Transport, Node), File, Size);
        {error, _} = Error -> Error
    end.

%% The file, and the slot, for as long as this process lives.
take(Transport, Store, Key) ->
    case lender(Store) of
        #borrower{path = Path, transport = Own} ->
            case is_agreed(Transport, Own) of
                true -> take(Path, Key);
                false -> {error, transport}
            end;
        none ->
            {error, gone}
    end.

%% What goes over TLS by this node's configuration does not leave it in the clear because a peer
%% asks so, nor through the channel of distribution, which may be in the clear.
is_agreed(tls, _Own) -> erllama_cache_peer_tls:is_configured();
is_agreed(_InTheClear, tls) -> false;
is_agreed(_InTheClear, _Own) -> true.

take(Path, Key) ->
    Guard = erllama_cache_nif:guard_new(persistent_term:get(?MODULE)),
    %% A guard that nobody refers to is collected, and its slot with it.
    _ = put(?MODULE, Guard),
    case erllama_cache_nif:try_acquire(Guard) of
        ok -> open(Path, Key);
        busy -> {error, busy}
    end.

%% The same through the distribution channel, for a peer that gets no connection: the process that
%% is returned sends `{Sender, piece, Bytes}' for each piece that it has credit for.
-spec offer_pieces(erllama_cache_host:tier_srv(), erllama_cache_nif:key(), pid()) ->
    {ok, Size :: pos_integer(), Sender :: pid(), pieces} | {error, term()}.
offer_pieces(Store, Key, Borrower) ->
    answer_of(fun(Asker) ->
        Borrowing = monitor(process, Borrower),
        case take(distribution, Store, Key) of
            {ok, File, Size} ->
                Asker ! {self(), {ok, Size, self(), pieces}},
                send_pieces(File, Borrower, Borrowing, 0);
            {error, _} = Error ->
                Asker ! {self(), Error}
        end
    end).

send_pieces(File, Borrower, Borrowing, 0) ->
    receive
        {Borrower, credit, Pieces} -> send_pieces(File, Borrower, Borrowing, Pieces);
        {'DOWN', Borrowing, process, Borrower, _Reason} -> ok
    after ?PATIENCE ->
        ok
    end;
send_pieces(File, Borrower, Borrowing, Credit) ->
    case file:read(File, ?MESSAGE) of
        {ok, Piece} ->
            Borrower ! {self(), piece, Piece},
            send_pieces(File, Borrower, Borrowing, Credit - 1);
        eof ->
            ok;
        {error, _} = Error ->
            Error
    end.

open(Path, Key) ->
    Name = erllama_cache_path:final(Path, Key),
    %% Opening what is not a file can take for ever.
    case file:read_link_info(Name, [raw]) of
        {ok, #file_info{type = regular}} -> open(Name);
        {ok, _} -> {error, gone};
        {error, enoent} -> {error, gone};
        {error, _} = Error -> Error
    end.

%% The store of this name, or the tier server, if it lends.
lender(Store) ->
    case erllama_cache_store_lookup:borrower(Store) of
        {ok, Borrower} -> Borrower;
        error -> erllama_cache_peer_tier:lender(Store)
    end.

open(Name) ->
    case file:open(Name, [read, raw, binary]) of
        {ok, File} ->
            {ok, Size} = file:position(File, eof),
            {ok, 0} = file:position(File, bof),
            {ok, File, Size};
        {error, enoent} ->
            {error, gone};
        {error, _} = Error ->
            Error
    end.

%% On the address by which the borrower's node is connected with this one.
listen({ok, Address}, File, Size) ->
    Options = [
        binary, {active, false}, {packet, raw}, {ip, Address}, {backlog, 1},
        {nodelay, true}, {send_timeout, ?PATIENCE}, {send_timeout_close, true}
        | [inet6 || tuple_size(Address) =:= 8]
    ],
    case gen_tcp:listen(0, Options) of
        {ok, Listen} ->
            {ok, Place} = inet:sockname(Listen),
            {ok, File, Size, Listen, Place};
        {error, _} = Error ->
            Error
    end;
listen({error, _} = Error, _File, _Size) ->
    Error.

address_towards(_Transport, Node) when Node =:= node() ->
    {ok, {127, 0, 0, 1}};
address_towards(tls, Node) ->
    erllama_cache_peer_tls:address_towards(Node);
address_towards(tcp, Node) ->
    case lists:keyfind(Node, 1, erlang:system_info(dist_ctrl)) of
        {Node, Port} when is_port(Port) ->
            case inet:sockname(Port) of
                {ok, {Address, _Port}} -> {ok, Address};
                {error, _} = Error -> Error
            end;
        %% Distribution is not over plain TCP: no address is known.
        _ ->
            {error, no_address}
    end.

serve(Watcher, {_Transport, Listen} = Door, File, Size, Ticket) ->
    Deadline = erlang:monotonic_time(millisecond) + ?PATIENCE,
    case accept(Door, Ticket, Deadline) of
        {ok, Connection} ->
            ok = gen_tcp:close(Listen),
            Watcher ! {self(), went_on},
            send(Watcher, File, Connection, 0, Size);
        {error, _} = Error ->
            Error
    end.

%% Whoever has no ticket is refused, and costs no more than the time that is left.
accept({Transport, Listen} = Door, Ticket, Deadline) ->
    case gen_tcp:accept(Listen, left(Deadline)) of
        {ok, Socket} ->
            case shows_ticket(Transport, Socket, Ticket, Deadline) of
                {true, Connection} ->
                    {ok, Connection};
                false ->
                    ok = gen_tcp:close(Socket),
                    accept(Door, Ticket, Deadline)
            end;
        {error, _} = Error ->
            Error
    end.

shows_ticket(tcp, Socket, Ticket, Deadline) ->
    is_ticket(gen_tcp:recv(Socket, byte_size(Ticket), with_one(Deadline)), Ticket, Socket);
%% The handshake has twice the time.
shows_ticket(tls, Socket, Ticket, Deadline) ->
    case erllama_cache_peer_tls:accept(Socket, min(2 * ?PATIENCE_WITH_ONE, left(Deadline))) of
        {ok, Secure} ->
            Shown = ssl:recv(Secure, byte_size(Ticket), with_one(Deadline)),
            is_ticket(Shown, Ticket, {tls, Secure});
        {error, _} ->
            false
    end.

with_one(Deadline) ->
    min(?PATIENCE_WITH_ONE, left(Deadline)).

is_ticket({ok, Shown}, Ticket, Connection) ->
    case crypto:hash_equals(Shown, Ticket) of
        true -> {true, Connection};
        false -> false
    end;
is_ticket({error, _}, _Ticket, _Connection) ->
    false.

left(Deadline) ->
    max(0, Deadline - erlang:monotonic_time(millisecond)).

send(_Watcher, _File, Connection, Size, Size) ->
    finish(Connection);
send(Watcher, File, Connection, Sent, Size) ->
    case send_piece(File, Connection, Sent, Size - Sent) of
        {ok, Bytes} when Bytes > 0 ->
            Watcher ! {self(), went_on},
            send(Watcher, File, Connection, Sent + Bytes, Size);
        %% Shorter than it was.
        {ok, 0} ->
            {error, eof};
        {error, _} = Error ->
            Error
    end.

send_piece(File, {tls, Secure}, Sent, Left) ->
    case file:pread(File, Sent, min(?MESSAGE, Left)) of
        {ok, Piece} ->
            case ssl:send(Secure, Piece) of
                ok -> {ok, byte_size(Piece)};
                {error, _} = Error -> Error
            end;
        eof ->
            {ok, 0};
        {error, _} = Error ->
            Error
    end;
send_piece(File, Socket, Sent, Left) ->
    file:sendfile(File, Socket, Sent, min(?PIECE, Left), []).

%% What is in the VM's buffers is sent before it is closed; the system has all of the other kind.
finish({tls, Secure}) -> ssl:close(Secure);
finish(_Socket) -> ok.
