%% A fake of the host's server of reservations.
%%
%% A reservation has a lease of a minute, which check, mark and announce renew. While it stands, the
%% key is in conflict with everybody else; when it has run out, its token is refused, and the key is
%% granted to whoever asks next. When its holder dies it is forgotten, unless its file has been
%% published: that is read whole, and adopted or deleted. Who asks for a key that is being saved may
%% wait for it, and is answered by the announcement alone.
%%
%% It is stricter than the host where a writer can be wrong without the host's seeing it: what is
%% marked and announced must be the file that stands there, and in this order. Otherwise the call
%% raises `{breaks_the_contract, What}' in its caller.
-module(erllama_cache_meta_srv).
-behaviour(gen_server).

%% Which kind of host this is: see erllama_fake.
-define(HAS_TOKENS, not defined(TEXT_KEYED)).
-define(HAS_TEXT, defined(TEXT_KEYED) orelse defined(BOTH_KINDS)).

-export([reserve_save/3, check_reservation/2, mark_published/3, cancel_reservation/2]).
-if(?HAS_TOKENS).
-export([announce_saved/5, insert_available/6]).
-endif.
-if(?HAS_TEXT).
-export([announce_saved/6, insert_available/7]).
-endif.
-export([start/0, start_link/0]).
-export([await/2, advance/1, expire/1, forget/1, reserved/0, stored/0, waiting/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% Milliseconds.
-define(LEASE, 60000).

-record(reservation, {
    token :: reference(),
    pid :: pid(),
    monitor :: reference(),
    ends :: integer(),
    path :: file:name_all() | undefined
}).

-record(state, {
    reservations = #{} :: #{binary() => #reservation{}},
    stored = [] :: [binary()],
    waiting = [] :: [{Key :: binary(), gen_server:from(), Timer :: reference()}],
    %% What tests have put this server's clock on by, in milliseconds.
    ahead = 0 :: non_neg_integer()
}).

-define(IS_KEY(Key), (is_binary(Key) andalso byte_size(Key) =:= 32)).
-define(IS_TIER(Tier), (Tier =:= disk orelse Tier =:= ram_file)).
-define(IS_PATH(Path), (is_list(Path) orelse is_binary(Path))).
-define(IS_FILE(Size, Tokens), (is_integer(Size) andalso Size > 0 andalso is_binary(Tokens))).
-define(IS_SIZE(Bytes), (is_integer(Bytes) andalso Bytes >= 0)).

%%% The host's functions

-spec reserve_save(<<_:256>>, disk | ram_file, pid()) ->
    {ok, reference()} | {error, already_present | conflict}.
reserve_save(Key, Tier, Pid)
    when ?IS_KEY(Key), ?IS_TIER(Tier), is_pid(Pid)
->
    call(reserve_save, [Key, Tier, Pid]).

-spec check_reservation(<<_:256>>, reference()) -> ok | {error, expired}.
check_reservation(Key, Token) when ?IS_KEY(Key), is_reference(Token) ->
    call(check_reservation, [Key, Token]).

-spec mark_published(<<_:256>>, reference(), file:name_all()) -> ok | {error, expired}.
mark_published(Key, Token, Path) when ?IS_KEY(Key), is_reference(Token), ?IS_PATH(Path) ->
    call(mark_published, [Key, Token, Path]).

-if(?HAS_TOKENS).
-spec announce_saved(<<_:256>>, reference(), pos_integer(), <<_:384>>, binary()) ->
    ok | {error, expired}.
announce_saved(Key, Token, Size, <<_:48/binary>> = Header, Tokens)
    when ?IS_KEY(Key), is_reference(Token), ?IS_FILE(Size, Tokens)
->
    call(announce_saved, [Key, Token, Size, Header, Tokens]).

-spec insert_available(<<_:256>>, disk | ram_file, pos_integer(), <<_:384>>,
                       {disk | ram_file, file:name_all()}, binary()) -> ok.
insert_available(Key, Tier, Size, <<_:48/binary>> = Header, {Tier, Path}, Tokens)
    when ?IS_KEY(Key), ?IS_TIER(Tier), ?IS_PATH(Path), ?IS_FILE(Size, Tokens)
->
    call(insert_available, [Key, Tier, Size, Header, {Tier, Path}, Tokens]).
-endif.

-if(?HAS_TEXT).
-spec announce_saved(<<_:256>>, reference(), pos_integer(), <<_:384>>, binary(),
                     non_neg_integer()) -> ok | {error, expired}.
announce_saved(Key, Token, Size, <<_:48/binary>> = Header, Tokens, TextBytes)
    when ?IS_KEY(Key), is_reference(Token), ?IS_FILE(Size, Tokens), ?IS_SIZE(TextBytes)
->
    call(announce_saved, [Key, Token, Size, Header, Tokens, TextBytes]).

-spec insert_available(<<_:256>>, disk | ram_file, pos_integer(), <<_:384>>,
                       {disk | ram_file, file:name_all()}, binary(), non_neg_integer()) -> ok.
insert_available(Key, Tier, Size, <<_:48/binary>> = Header, {Tier, Path}, Tokens, TextBytes)
    when ?IS_KEY(Key), ?IS_TIER(Tier), ?IS_PATH(Path), ?IS_FILE(Size, Tokens), ?IS_SIZE(TextBytes)
->
    call(insert_available, [Key, Tier, Size, Header, {Tier, Path}, Tokens, TextBytes]).
-endif.

-spec cancel_reservation(<<_:256>>, reference()) -> ok.
cancel_reservation(Key, Token) when ?IS_KEY(Key), is_reference(Token) ->
    call(cancel_reservation, [Key, Token]).

call(Name, Args) ->
    erllama_fake:call(Name, Args, fun() ->
        case gen_server:call(?MODULE, list_to_tuple([Name | Args])) of
            {breaks_the_contract, _} = Reason -> error(Reason);
            Answer -> Answer
        end
    end).

%%% For tests. None of these is logged.

-spec start() -> {ok, pid()}.
start() ->
    {ok, _} = gen_server:start({local, ?MODULE}, ?MODULE, [], []).

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    erllama_fake:start_link(?MODULE, ?MODULE, []).

%% Asks for a key as a turn does that follows: while it is being saved, for so many milliseconds.
-spec await(<<_:256>>, non_neg_integer()) -> stored | miss.
await(Key, Timeout) ->
    gen_server:call(?MODULE, {await, Key, Timeout}, infinity).

%% Lets time pass for leases.
-spec advance(non_neg_integer()) -> ok.
advance(Ms) ->
    gen_server:call(?MODULE, {advance, Ms}).

%% Ends a reservation's lease.
-spec expire(<<_:256>>) -> ok.
expire(Key) ->
    gen_server:call(?MODULE, {expire, Key}).

%% Forgets that a key is stored, as a host that has lost its index.
-spec forget(<<_:256>>) -> ok.
forget(Key) ->
    gen_server:call(?MODULE, {forget, Key}).

-spec reserved() -> [{Key :: <<_:256>>, Token :: reference()}].
reserved() ->
    gen_server:call(?MODULE, reserved).

-spec stored() -> [Key :: <<_:256>>].
stored() ->
    gen_server:call(?MODULE, stored).

%% The keys that somebody waits for.
-spec waiting() -> [Key :: <<_:256>>].
waiting() ->
    gen_server:call(?MODULE, waiting).

%%% The server

init([]) ->
    {ok, #state{}}.

handle_call({reserve_save, Key, _Tier, Pid}, _From, State0) ->
    #state{reservations = Reservations, stored = Stored} = State = without_the_dead(Key, State0),
    case {lists:member(Key, Stored), find(Key, State)} of
        {true, _} ->
            {reply, {error, already_present}, State};
        {false, {ok, _Reservation}} ->
            {reply, {error, conflict}, State};
        {false, Lapsed} ->
            [true = demonitor(Monitor, [flush])
             || {lapsed, #reservation{monitor = Monitor}} <- [Lapsed]],
            Token = make_ref(),
            New = #reservation{
                token = Token, pid = Pid, monitor = monitor(process, Pid), ends = lease(State)
            },
            {reply, {ok, Token}, State#state{reservations = Reservations#{Key => New}}}
    end;
handle_call({check_reservation, Key, Token}, _From, State) ->
    case find(Key, Token, State) of
        {ok, Reservation} -> {reply, ok, renew(Key, Reservation, State)};
        stale -> {reply, {error, expired}, State}
    end;
handle_call({mark_published, Key, Token, Path}, _From, State) ->
    case find(Key, Token, State) of
        {ok, Reservation} ->
            case erllama_fake_kvc:look(Path) of
                {ok, #{key := Key}, _Payload} ->
                    {reply, ok, renew(Key, Reservation#reservation{path = Path}, State)};
                {ok, #{key := Another}, _Payload} ->
                    breaks({marked_file_of, Another}, State);
                {error, Reason} ->
                    breaks({marked_file, Reason}, State)
            end;
        stale ->
            {reply, {error, expired}, State}
    end;
handle_call(Announcement, _From, State) when element(1, Announcement) =:= announce_saved ->
    [announce_saved, Key, Token | Description] = tuple_to_list(Announcement),
    case find(Key, Token, State) of
        {ok, #reservation{path = undefined}} ->
            breaks(announced_before_marked, State);
        {ok, #reservation{path = Path}} ->
            case describes(Description, Key, Path) of
                ok -> {reply, ok, answer(Key, store(Key, drop(Key, State)))};
                {error, Reason} -> breaks({announced, Reason}, State)
            end;
        stale ->
            {reply, {error, expired}, State}
    end;
handle_call(Insertion, _From, State) when element(1, Insertion) =:= insert_available ->
    [insert_available, Key, _Tier, Size, Header, {_, Path} | Content] = tuple_to_list(Insertion),
    case {describes([Size, Header | Content], Key, Path), find(Key, State)} of
        {ok, none} -> {reply, ok, answer(Key, store(Key, State))};
        {ok, _} -> breaks({inserted, reserved}, State);
        {{error, Reason}, _} -> breaks({inserted, Reason}, State)
    end;
handle_call({cancel_reservation, Key, Token}, _From, #state{reservations = All} = State) ->
    case All of
        #{Key := #reservation{token = Token}} -> {reply, ok, drop(Key, State)};
        _ -> {reply, ok, State}
    end;
handle_call({await, Key, Timeout}, From, #state{stored = Stored, waiting = Waiting} = State) ->
    case {lists:member(Key, Stored), find(Key, State)} of
        {true, _} ->
            {reply, stored, State};
        {false, none} ->
            {reply, miss, State};
        {false, _} ->
            Timer = erlang:start_timer(Timeout, self(), From),
            {noreply, State#state{waiting = [{Key, From, Timer} | Waiting]}}
    end;
handle_call({advance, Ms}, _From, #state{ahead = Ahead} = State) ->
    {reply, ok, State#state{ahead = Ahead + Ms}};
handle_call({expire, Key}, _From, #state{reservations = Reservations} = State) ->
    #{Key := Reservation} = Reservations,
    Lapsed = Reservation#reservation{ends = now_ms(State)},
    {reply, ok, State#state{reservations = Reservations#{Key := Lapsed}}};
handle_call({forget, Key}, _From, #state{stored = Stored} = State) ->
    {reply, ok, State#state{stored = lists:delete(Key, Stored)}};
handle_call(reserved, _From, #state{reservations = Reservations} = State) ->
    Reserved = [{Key, Token} || {Key, #reservation{token = Token}} <- maps:to_list(Reservations)],
    {reply, Reserved, State};
handle_call(stored, _From, #state{stored = Stored} = State) ->
    {reply, Stored, State};
handle_call(waiting, _From, #state{waiting = Waiting} = State) ->
    {reply, [Key || {Key, _, _} <- Waiting], State}.

handle_cast(_Request, State) ->
    {noreply, State}.

handle_info({'DOWN', Monitor, process, _Pid, _Reason}, State) ->
    [Key] = [Key || {Key, #reservation{monitor = M}} <- maps:to_list(State#state.reservations),
                    M =:= Monitor],
    {noreply, holder_died(Key, State)};
handle_info({timeout, Timer, From}, #state{waiting = Waiting} = State) ->
    case lists:keytake(Timer, 3, Waiting) of
        {value, _, Others} ->
            ok = gen_server:reply(From, miss),
            {noreply, State#state{waiting = Others}};
        false ->
            {noreply, State}
    end.

%% Whether a file is what is said of it: its size, its header, its tokens and, in a text-keyed host,
%% the size of its text.
describes(Description, Key, Path) ->
    case erllama_fake_kvc:look(Path) of
        {ok, #{key := Key, size := Size, header := Header, tokens := Tokens, prompt_text := Text},
         _Payload} ->
            File = [Size, Header, Tokens, byte_size(Text)],
            case lists:sublist(File, length(Description)) of
                Description -> ok;
                _ -> {error, {Description, File}}
            end;
        {ok, #{key := Another}, _Payload} ->
            {error, {file_of, Another}};
        {error, _} = Error ->
            Error
    end.

breaks(What, State) ->
    {reply, {breaks_the_contract, What}, State}.

find(Key, #state{reservations = Reservations} = State) ->
    Now = now_ms(State),
    case Reservations of
        #{Key := #reservation{ends = Ends} = Reservation} when Ends > Now -> {ok, Reservation};
        #{Key := Reservation} -> {lapsed, Reservation};
        _ -> none
    end.

find(Key, Token, State) ->
    case find(Key, State) of
        {ok, #reservation{token = Token}} = Found -> Found;
        _ -> stale
    end.

renew(Key, Reservation, #state{reservations = Reservations} = State) ->
    Renewed = Reservation#reservation{ends = lease(State)},
    State#state{reservations = Reservations#{Key := Renewed}}.

lease(State) ->
    now_ms(State) + ?LEASE.

now_ms(#state{ahead = Ahead}) ->
    erlang:monotonic_time(millisecond) + Ahead.

%% The message that tells of a holder's death may come after the next one's question.
without_the_dead(Key, #state{reservations = Reservations} = State) ->
    case Reservations of
        #{Key := #reservation{pid = Pid}} ->
            case is_process_alive(Pid) of
                true -> State;
                false -> holder_died(Key, State)
            end;
        _ ->
            State
    end.

holder_died(Key, #state{reservations = Reservations} = State) ->
    #{Key := #reservation{path = Path}} = Reservations,
    Dropped = drop(Key, State),
    case Path =/= undefined andalso erllama_fake_kvc:read(Path) of
        false ->
            Dropped;
        {ok, #{key := Key}, _Payload} ->
            store(Key, Dropped);
        _ ->
            _ = file:delete(Path),
            Dropped
    end.

drop(Key, #state{reservations = Reservations} = State) ->
    {#reservation{monitor = Monitor}, Others} = maps:take(Key, Reservations),
    true = demonitor(Monitor, [flush]),
    State#state{reservations = Others}.

store(Key, #state{stored = Stored} = State) ->
    State#state{stored = [Key | lists:delete(Key, Stored)]}.

answer(Key, #state{waiting = Waiting} = State) ->
    {Answered, Others} = lists:partition(fun({For, _, _}) -> For =:= Key end, Waiting),
    [gen_server:reply(From, stored) || {_, From, _} <- Answered],
    State#state{waiting = Others}.
