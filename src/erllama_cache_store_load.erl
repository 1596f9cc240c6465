%% One load from a store, in the calling process: from the payload of a pending save, from the
%% disk, or from a peer; and what the index learns by it.
%%
%% @private
-module(erllama_cache_store_load).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

-export([run/4, load_file/3, gone/2]).

%% Seconds between two notes of use in one file.
-define(NOTE_EVERY, 3600).

%% Of a token in a file.
-define(TOKEN_BYTES, 4).

%% `Peers' says whether they are asked.
-spec run(erllama_cache_store:name(), erllama_cache_nif:key(), timeout(), Peers :: boolean()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | miss | {error, term()}.
run(Name, Key, Timeout, Peers) ->
    Config = erllama_cache_index:config(Name),
    case erllama_cache_pending:find(erllama_cache_pending:scope(erllama_cache_store, Name), Key) of
        {ok, Info, Payload, _Owner} ->
            count_one(Config, ?HITS),
            {ok, Info, Payload};
        none ->
            Deadline = deadline(Timeout),
            case load_file(Config, Key, Timeout) of
                miss when Peers -> load_from_peer(Config, Key, Deadline);
                Result -> Result
            end
    end.

load_from_peer(Config, Key, Deadline) ->
    #config{borrower = Borrower} = Config,
    case erllama_cache_peers:fetch_file(Borrower, Key, left(Deadline)) of
        ok -> load_file(Config, Key, left(Deadline));
        %% It is there, under somebody else's reservation.
        {error, expired} -> load_file(Config, Key, left(Deadline));
        miss -> miss;
        {error, timeout} = Error -> Error;
        %% Why it cannot be here: no room, or a disk that fails. A save would say it, too.
        {error, _} -> miss
    end.

deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

left(infinity) -> infinity;
left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).

%% The same from the disk alone.
-spec load_file(erllama_cache_store:name() | #config{}, erllama_cache_nif:key(), timeout()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary()} | miss | {error, term()}.
load_file(Name, Key, Timeout) when is_atom(Name) ->
    load_file(erllama_cache_index:config(Name), Key, Timeout);
load_file(#config{name = Name, path = Path, secret = Secret} = Config, Key, Timeout) ->
    %% Only this row may be removed: a save may end while the load finds no file.
    Known = erllama_cache_index:row(Name, Key),
    Result = erllama_cache_load:run(Path, Key, Secret, Timeout),
    ok = erllama_cache_store_claim:notice_other_root(Config),
    case Result of
        {ok, Info, _Payload} ->
            count_one(Config, ?HITS),
            used(Config, Key, Info, Known);
        miss ->
            count_one(Config, ?MISSES),
            gone(Config, Known);
        {error, Reason} when Reason =:= unauthenticated; element(1, Reason) =:= corrupt ->
            %% A save of this key finds the file and replaces it.
            count_one(Config, ?REFUSED),
            erllama_cache_index:refuse(Name, Known);
        {error, _} ->
            ok
    end,
    Result.

used(#config{name = Name, eviction = Policy} = Config, Key, Info, Known) ->
    #{file_size := Size, last_used_time := InFile} = Info,
    Now = now_ms(),
    ok = erllama_cache_index:accept(Name, Known, length_of(Info)),
    case erllama_cache_index:use(Name, Key, Now, erllama_cache_evict:used(Policy, Now)) of
        {Uses, Noted} -> note_in_file(Config, Key, Uses, [Noted, InFile], Now div 1000);
        %% Saved by another node on the same root.
        false when Known =:= none -> found(Config, Key, length_of(Info), Size, Now);
        %% Deleted since.
        false -> ok
    end.

%% The order of eviction after a restart needs no more than an hour's precision, and each backup
%% would resend a file that changes with each load. A note an hour in the future was written by a
%% wrong clock, and would make the file look just used at each start until then. A `ttl' wants notes
%% in time: other nodes go by them.
note_in_file(#config{name = Name, path = Path, ttl = Ttl}, Key, Uses, Notes, Now) ->
    Every = case Ttl of
        infinity -> ?NOTE_EVERY;
        _ -> min(?NOTE_EVERY, Ttl div 2000)
    end,
    IsDue = lists:all(fun(Note) -> abs(Now - Note) >= Every end, Notes),
    case IsDue andalso Uses > 0 of
        true ->
            ok = erllama_cache_nif:note_use(Path, Key, min(Uses, 16#ffffffff), Now),
            erllama_cache_index:noted(Name, Key, Uses, Now);
        false ->
            ok
    end.

%% A file that the index does not know.
found(#config{bounded = false, name = Name}, Key, Length, Size, LastUsed) ->
    Row = erllama_cache_index:file(Key, Length, Size, LastUsed, make_ref()),
    _ = erllama_cache_index:add(Name, Row),
    ok;
found(#config{name = Name}, Key, Length, Size, LastUsed) ->
    gen_server:cast(Name, {found, Key, Length, Size, LastUsed}).

%% What the key of a loaded file is made of.
length_of(#{version := 1, tokens := Tokens}) -> {tokens, byte_size(Tokens) div ?TOKEN_BYTES};
length_of(#{version := 2, prompt_text := Text}) -> {text, byte_size(Text)}.

%% The file of this row is gone.
gone(_Config, none) ->
    ok;
gone(_Config, #row{state = reserved}) ->
    ok;
gone(#config{bounded = false, name = Name}, Row) ->
    _ = erllama_cache_index:remove(Name, Row),
    ok;
gone(#config{name = Name}, Row) ->
    %% Nobody is to find it before the server has removed the row.
    ok = erllama_cache_index:refuse(Name, Row),
    gen_server:cast(Name, {gone, Row}).

count_one(#config{counters = Counters}, Index) ->
    counters:add(Counters, Index, 1).

now_ms() ->
    erlang:system_time(millisecond).
