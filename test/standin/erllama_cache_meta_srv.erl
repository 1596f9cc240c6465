%% Stands in for the host's server of reservations. A reservation is forgotten when the process that
%% saves dies, unless its file has been published: then that file is adopted. Leases end only when
%% a test says so, see expire/1.
-module(erllama_cache_meta_srv).
-behaviour(gen_server).

-export([reserve_save/3, check_reservation/2, mark_published/3, announce_saved/5,
         cancel_reservation/2]).
-export([start/0, expire/1, forget/1, reserved/0, stored/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-record(reservation, {
    token :: reference(),
    monitor :: reference(),
    path :: file:name_all() | undefined
}).

-record(state, {
    reservations = #{} :: #{binary() => #reservation{}},
    stored = [] :: [binary()]
}).

%%% The host's functions

-spec reserve_save(<<_:256>>, disk | ram_file, pid()) ->
    {ok, reference()} | {error, already_present | conflict}.
reserve_save(Key, Tier, Pid) ->
    call(reserve_save, [Key, Tier, Pid]).

-spec check_reservation(<<_:256>>, reference()) -> ok | {error, expired}.
check_reservation(Key, Token) ->
    call(check_reservation, [Key, Token]).

-spec mark_published(<<_:256>>, reference(), file:name_all()) -> ok | {error, expired}.
mark_published(Key, Token, Path) ->
    call(mark_published, [Key, Token, Path]).

-spec announce_saved(<<_:256>>, reference(), pos_integer(), <<_:384>>, binary()) ->
    ok | {error, expired}.
announce_saved(Key, Token, Size, Header, Tokens) ->
    call(announce_saved, [Key, Token, Size, Header, Tokens]).

-spec cancel_reservation(<<_:256>>, reference()) -> ok.
cancel_reservation(Key, Token) ->
    call(cancel_reservation, [Key, Token]).

call(Name, Args) ->
    erllama_standin:call(Name, Args, fun() ->
        gen_server:call(?MODULE, list_to_tuple([Name | Args]))
    end).

%%% For tests. None of these is logged.

-spec start() -> {ok, pid()}.
start() ->
    {ok, _} = gen_server:start({local, ?MODULE}, ?MODULE, [], []).

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

%%% The server

init([]) ->
    {ok, #state{}}.

handle_call({reserve_save, Key, _Tier, Pid}, _From, State) ->
    #state{reservations = Reservations, stored = Stored} = State,
    case {lists:member(Key, Stored), Reservations} of
        {true, _} ->
            {reply, {error, already_present}, State};
        {false, #{Key := _}} ->
            {reply, {error, conflict}, State};
        {false, _} ->
            Token = make_ref(),
            New = #reservation{token = Token, monitor = monitor(process, Pid)},
            {reply, {ok, Token}, State#state{reservations = Reservations#{Key => New}}}
    end;
handle_call({check_reservation, Key, Token}, _From, State) ->
    case find(Key, Token, State) of
        {ok, _} -> {reply, ok, State};
        error -> {reply, {error, expired}, State}
    end;
handle_call({mark_published, Key, Token, Path}, _From, State) ->
    case find(Key, Token, State) of
        {ok, Reservation} ->
            #state{reservations = Reservations} = State,
            Marked = Reservations#{Key := Reservation#reservation{path = Path}},
            {reply, ok, State#state{reservations = Marked}};
        error ->
            {reply, {error, expired}, State}
    end;
handle_call({announce_saved, Key, Token, _Size, _Header, _Tokens}, _From, State) ->
    case find(Key, Token, State) of
        {ok, #reservation{path = Path}} when Path =/= undefined ->
            {reply, ok, store(Key, drop(Key, State))};
        _ ->
            {reply, {error, expired}, State}
    end;
handle_call({cancel_reservation, Key, Token}, _From, State) ->
    case find(Key, Token, State) of
        {ok, _} -> {reply, ok, drop(Key, State)};
        error -> {reply, ok, State}
    end;
handle_call({expire, Key}, _From, State) ->
    {reply, ok, drop(Key, State)};
handle_call({forget, Key}, _From, #state{stored = Stored} = State) ->
    {reply, ok, State#state{stored = lists:delete(Key, Stored)}};
handle_call(reserved, _From, #state{reservations = Reservations} = State) ->
    Reserved = [{Key, Token} || {Key, #reservation{token = Token}} <- maps:to_list(Reservations)],
    {reply, Reserved, State};
handle_call(stored, _From, #state{stored = Stored} = State) ->
    {reply, Stored, State}.

handle_cast(_Request, State) ->
    {noreply, State}.

handle_info({'DOWN', Monitor, process, _Pid, _Reason}, State) ->
    [{Key, #reservation{path = Path}}] =
        [Entry || {_, #reservation{monitor = M}} = Entry
                      <- maps:to_list(State#state.reservations), M =:= Monitor],
    Dropped = drop(Key, State),
    case Path =/= undefined andalso is_whole(Path) of
        true -> {noreply, store(Key, Dropped)};
        false -> {noreply, Dropped}
    end.

find(Key, Token, #state{reservations = Reservations}) ->
    case Reservations of
        #{Key := #reservation{token = Token} = Reservation} -> {ok, Reservation};
        _ -> error
    end.

drop(Key, #state{reservations = Reservations} = State) ->
    {#reservation{monitor = Monitor}, Others} = maps:take(Key, Reservations),
    true = demonitor(Monitor, [flush]),
    State#state{reservations = Others}.

store(Key, #state{stored = Stored} = State) ->
    State#state{stored = [Key | Stored]}.

%% What the host makes of a published file whose writer has died, in short.
is_whole(Path) ->
    case file:read_file(Path) of
        {ok, <<"KVC", 1, _:44/binary, Offset:64/little, Length:64/little, _/binary>> = File} ->
            byte_size(File) =:= Offset + Length;
        _ ->
            false
    end.
