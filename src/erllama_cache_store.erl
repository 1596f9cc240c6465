%% @doc The built-in store: KV files in one directory.
%%
%% It is a host for the writer (key, reservation, root), and it loads, deletes, and evicts the least
%% recently used files. Loads and saves run in the calling process. The store's server watches
%% reservations and, in a bounded store, the room.
%%
%% The index is an ETS table of the store's name with one row for each key. It is built from the
%% files' headers when the store starts, and read without the server. The files are the truth:
%% several nodes may share a root, and a load finds what another node has saved.
-module(erllama_cache_store).
-behaviour(erllama_cache_host).

-include("erllama_cache_index.hrl").
-include("erllama_cache_limits.hrl").
-include("erllama_cache_store.hrl").

-export([start_link/2, child_spec/2]).
-export([load/2, load/3, load_file/3, delete/2, info/1, key/1, key/2, longest_prefix/2]).
-export([find_keyed_by/1, find_borrower/1]).
-export([identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).
-export_type([name/0, options/0, file_info/0, info/0]).

-type name() :: atom().
-type options() :: #{
    root := file:name_all(),
    tier => erllama_cache_host:tier(),
    max_bytes => pos_integer() | infinity,
    keyed_by => erllama_cache_host:keyed_by(),
    mac_key => {file, file:name_all()} | fun(() -> <<_:256>>),
    peers => none | atom(),
    peer_timeout => pos_integer(),
    peer_transport => tcp | tls | distribution
}.
%% <ul>
%% <li>`root': the directory, which must exist;</li>
%% <li>`tier': the kind of store (default: `disk');</li>
%% <li>`max_bytes': how many bytes its files may take together (default: `infinity');</li>
%% <li>`keyed_by': what keys are made of: `tokens' (default; files of version 1) or `text', the
%%   metadata's `prompt_text' (files of version 2). A store loads files of both versions;</li>
%% <li>`mac_key': the secret that keys the writer's digests (default: `mac_key' of the application's
%%   environment, or none). With a secret, loads accept only files whose digest it keyed;</li>
%% <li>`peers': the group of stores that lend each other their files: see {@link
%%   erllama_cache_peers} (default: `none');</li>
%% <li>`peer_timeout': milliseconds for which a load that misses waits for their answers (default:
%%   50);</li>
%% <li>`peer_transport': how their files come: over a connection of their own (default: `tcp'), the
%%   same over TLS (`tls') with the certificates of `-ssl_dist_optfile', or through the channel of
%%   Erlang's distribution (`distribution'), where no other port may be opened.</li>
%% </ul>

-type file_info() :: #{
    version := 1 | 2,
    save_reason := erllama_cache_meta:save_reason(),
    quant_bits := byte(),
    quant_type := atom(),
    quant_byte := byte(),
    fingerprint := <<_:256>>,
    fingerprint_mode := erllama_cache_meta:fingerprint_mode(),
    ctx_params_hash := <<_:256>>,
    tokens := <<_:_*32>>,
    context_size := non_neg_integer(),
    creation_time := non_neg_integer(),
    last_used_time := non_neg_integer(),
    hit_count := non_neg_integer(),
    prompt_text := binary(),
    hostname := binary(),
    erllama_version := binary(),
    save_reason_detail := binary(),
    file_size := pos_integer()
}.
%% What describes a payload, under the keys of the `build_meta' map. Last use and hits are as they
%% were before this load. `quant_type' is `undefined' for an unknown byte. The tokens are four bytes
%% each, as in the file: `[T || <<T:32/little>> <= Tokens]'. A list of them would be garbage on the
%% heap of a process that is about to decode the next token.

-type info() :: #{
    name := name(),
    root := file:name_all(),
    tier := erllama_cache_host:tier(),
    keyed_by := erllama_cache_host:keyed_by(),
    max_bytes := pos_integer() | infinity,
    files := non_neg_integer(),
    bytes := non_neg_integer(),
    reservations := non_neg_integer(),
    saves := non_neg_integer(),
    duplicates := non_neg_integer(),
    hits := non_neg_integer(),
    misses := non_neg_integer(),
    refused := non_neg_integer(),
    evictions := non_neg_integer(),
    fetched := non_neg_integer(),
    fetched_bytes := non_neg_integer(),
    fetch_failures := non_neg_integer()
}.

%% Seconds between two notes of use in one file.
-define(NOTE_EVERY, 3600).

%% Of a token, in a file and in what a key is made of.
-define(TOKEN_BYTES, 4).

-define(KEY_BYTES, 32).
-define(IS_KEY(Key), (is_binary(Key) andalso byte_size(Key) =:= ?KEY_BYTES)).

%%% Starting

%% @doc Starts a store. Its name is the first argument of {@link erllama_cache_writer:save/4}. The
%% root is scanned before this returns. The scan reads headers only. It removes files that are
%% proven not to be what their names say, and temporary files of saves that have ended.
%%
%% ```
%% {ok, _} = erllama_cache_store:start_link(my_store, #{root => "/var/cache/kv",
%%                                                      max_bytes => 100 bsl 30}).
%% '''
%%
%% A relative root is resolved against the current directory at this moment, and stays the same when
%% that changes.
%%
%% Errors: a POSIX reason, `badarg' or `{unencodable, Encoding}', of the root. Raises
%% `{missing_option, root}', `{invalid_option, Key, Value}' and `{unknown_option, Key, Nearest}'.
-spec start_link(name(), options()) -> {ok, pid()} | {error, term()}.
start_link(Name, Options) when is_atom(Name), is_map(Options) ->
    #{root := Root} = Complete = erllama_cache_config:complete_options(Options),
    case erllama_cache_path:absolute(Root) of
        {ok, Absolute, Path} ->
            erllama_cache_store_server:start_link(Name, Path, Complete#{root := Absolute});
        {error, _} = Error ->
            Error
    end.

%% @doc Returns a child specification for your own supervisor.
%%
%% ```
%% #{start := {erllama_cache_store, start_link, _}} =
%%     erllama_cache_store:child_spec(my_store, #{root => "/var/cache/kv"}).
%% '''
-spec child_spec(name(), options()) -> supervisor:child_spec().
child_spec(Name, Options) when is_map(Options), not is_map_key(root, Options) ->
    #{id => {?MODULE, Name}, start => {?MODULE, start_link, [Name, Options]}};
child_spec(Name, #{root := Root} = Options) ->
    %% A restart may come after a change of the current directory.
    Fixed = case erllama_cache_path:absolute(Root) of
        {ok, Absolute, _Path} -> Options#{root := Absolute};
        %% start_link/2 returns it.
        {error, _} -> Options
    end,
    #{id => {?MODULE, Name}, start => {?MODULE, start_link, [Name, Fixed]}}.

%%% Loading, deleting, looking

%% @doc Loads the payload that is stored under a key, in the calling process. Every byte has been
%% checked when this returns. A file that fails a check is `{error, {corrupt, Reason}}'; it stays
%% until a save of the same key replaces it, or it is deleted. While a save of the key is pending
%% behind its caller, the answer is that save's payload, from memory. A store with `peers' takes a
%% file that it lacks from one of them.
%%
%% ```
%% {ok, #{context_size := 4096, hit_count := 0, tokens := Tokens}, Payload} =
%%     erllama_cache_store:load(my_store, Key),
%% [1, 15043, 3186] = [Token || <<Token:32/little>> <= Tokens].
%% '''
%%
%% Errors: `{corrupt, Reason}'; `unauthenticated', the store has a secret and the file was made
%% without it; `enomem'; a POSIX reason. {@link erllama_cache_writer:format_error/1} describes them.
%% Exits with `{noproc, _}' when the store does not run.
-spec load(name(), erllama_cache_writer:key()) ->
    {ok, file_info(), Payload :: binary()} | miss | {error, term()}.
load(Name, Key) ->
    load(Name, Key, infinity).

%% @doc Loads as {@link load/2}, and gives up after so many milliseconds, between two slices; with
%% `peers' false, no peer is asked.
%%
%% ```
%% {ok, _Info, Payload} = erllama_cache_store:load(my_store, Key, 2000),
%% miss = erllama_cache_store:load(my_store, <<1:256>>, #{peers => false}).
%% '''
%%
%% Errors: also `timeout'.
-spec load(name(), erllama_cache_writer:key(),
           timeout() | #{timeout => timeout(), peers => boolean()}) ->
    {ok, file_info(), Payload :: binary()} | miss | {error, term()}.
load(Name, Key, Options) when is_map(Options) ->
    #{timeout := Timeout, peers := Peers} =
        erllama_cache_config:load_options(Options, #{timeout => infinity, peers => true}),
    load(Name, Key, Timeout, Peers);
load(Name, Key, Timeout) ->
    load(Name, Key, Timeout, true).

load(Name, Key, Timeout, Peers) when
    is_atom(Name), ?IS_KEY(Key), ?IS_TIMEOUT(Timeout), is_boolean(Peers)
->
    Load = fun() -> load_from_anywhere(Name, Key, Timeout, Peers) end,
    erllama_cache_telemetry:span(load, #{name => Name, key => Key},
                                 {Load, fun erllama_cache_load:described/1}).

load_from_anywhere(Name, Key, Timeout, Peers) ->
    Config = config(Name),
    case erllama_cache_pending:find(erllama_cache_pending:scope(?MODULE, Name), Key) of
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
        miss -> miss;
        {error, timeout} = Error -> Error;
        %% Why it cannot be here: no room, or a disk that fails. A save would say it, too.
        {error, _} -> miss
    end.

deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

left(infinity) -> infinity;
left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).

%% @private
%% The same from the disk alone.
-spec load_file(name() | #config{}, erllama_cache_writer:key(), timeout()) ->
    {ok, file_info(), Payload :: binary()} | miss | {error, term()}.
load_file(Name, Key, Timeout) when is_atom(Name) ->
    load_file(config(Name), Key, Timeout);
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

used(#config{name = Name} = Config, Key, Info, Known) ->
    #{file_size := Size, last_used_time := InFile} = Info,
    Now = now_ms(),
    ok = erllama_cache_index:accept(Name, Known, length_of(Info)),
    case erllama_cache_index:use(Name, Key, Now) of
        {Uses, Noted} -> note_in_file(Config, Key, Uses, [Noted, InFile], Now div 1000);
        %% Saved by another node on the same root.
        false when Known =:= none -> found(Config, Key, length_of(Info), Size, Now);
        %% Deleted since.
        false -> ok
    end.

%% The order of eviction after a restart needs no more than an hour's precision, and each backup
%% would resend a file that changes with each load. A note an hour in the future was written by a
%% wrong clock, and would make the file look just used at each start until then.
note_in_file(#config{name = Name, path = Path}, Key, Uses, Notes, Now) ->
    IsDue = lists:all(fun(Note) -> abs(Now - Note) >= ?NOTE_EVERY end, Notes),
    case IsDue andalso Uses > 0 of
        true ->
            ok = erllama_cache_nif:note_use(Path, Key, min(Uses, 16#ffffffff), Now),
            erllama_cache_index:noted(Name, Key, Uses, Now);
        false ->
            ok
    end.

%% A file that the index does not know.
found(#config{max_bytes = infinity, name = Name}, Key, Length, Size, LastUsed) ->
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
gone(#config{max_bytes = infinity, name = Name}, Row) ->
    _ = erllama_cache_index:remove(Name, Row),
    ok;
gone(#config{name = Name}, Row) ->
    %% Nobody is to find it before the server has removed the row.
    ok = erllama_cache_index:refuse(Name, Row),
    gen_server:cast(Name, {gone, Row}).

%% @doc Deletes what is stored under a key; `ok' also when nothing is. Errors: a POSIX reason.
%%
%% ```
%% ok = erllama_cache_store:delete(my_store, Key).
%% '''
-spec delete(name(), erllama_cache_writer:key()) -> ok | {error, term()}.
delete(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    #config{path = Path} = Config = config(Name),
    Known = erllama_cache_index:row(Name, Key),
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end) of
        %% Whether there was one.
        Existed when is_boolean(Existed) -> gone(Config, Known);
        {error, _} = Error -> Error
    end.

%% @doc Returns the key of a save with this map in a store that is keyed by tokens: 32 bytes, made
%% from `fingerprint', `quant_type', `ctx_params_hash' and `tokens'. Other fields are ignored.
%%
%% ```
%% {ok, Key} = erllama_cache_store:key(#{fingerprint => Fingerprint, quant_type => f16,
%%                                       ctx_params_hash => CtxParamsHash, tokens => [1, 15043]}).
%% '''
%%
%% Errors: `{missing_key, Key}' and `{invalid_meta, Key}'.
-spec key(erllama_cache_meta:identity()) ->
    {ok, erllama_cache_writer:key()} | {error, erllama_cache_meta:invalid()}.
key(Meta) ->
    key(Meta, #{}).

%% @doc Returns the key of a save with this map in a store with this option `keyed_by'. For `text'
%% it is made from `prompt_text' instead of `tokens'. Errors as of {@link key/1}.
%%
%% ```
%% {ok, Key} = erllama_cache_store:key(#{fingerprint => Fingerprint, quant_type => f16,
%%                                       ctx_params_hash => CtxParamsHash,
%%                                       prompt_text => <<"Once upon">>}, #{keyed_by => text}).
%% '''
-spec key(erllama_cache_meta:identity(), #{keyed_by => erllama_cache_host:keyed_by()}) ->
    {ok, erllama_cache_writer:key()} | {error, erllama_cache_meta:invalid()}.
key(Meta, Options) when is_map(Meta), is_map(Options) ->
    case erllama_cache_store_key:parts(erllama_cache_config:keyed_by(Options), Meta) of
        {ok, Namespace, Keyed} -> {ok, erllama_cache_store_key:in(Namespace, Keyed)};
        {error, _} = Error -> Error
    end.

%% @doc Finds the stored state with the longest prefix of these tokens, or of this `prompt_text' in
%% a store that is keyed by text. It uses those fields of the map that make a key, as {@link key/2}
%% does: a state is found if it has the same fingerprint, quantisation and context parameters. The
%% length is in tokens, or in bytes of text. A state that was saved with no tokens, or with an empty
%% text, is a prefix of every prompt, of length 0.
%%
%% ```
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta#{tokens => [1, 15043]}, Payload),
%% {ok, Key, 2} = erllama_cache_store:longest_prefix(my_store, Meta#{tokens => [1, 15043, 3186]}),
%% {ok, _Info, Payload} = erllama_cache_store:load(my_store, Key).
%% '''
%%
%% No file is read. The answer is what the index knows: of the files that another node has saved
%% since this store started, those that a load has found. It may be a file that somebody has deleted
%% behind the store's back, or one that no load accepts. A load of it returns `miss',
%% `{error, {corrupt, _}}' or `{error, unauthenticated}', and from then on it is not found any more:
%% ask again, until a load succeeds or there is no prefix.
%%
%% This hashes the prompt once and looks up one key for each length that stored files have. Errors
%% as of {@link key/1}. Exits with `{noproc, _}' when the store does not run.
-spec longest_prefix(name(), erllama_cache_meta:identity()) ->
    {ok, erllama_cache_writer:key(), Length :: non_neg_integer()} | miss
    | {error, erllama_cache_meta:invalid()}.
longest_prefix(Name, Meta) when is_atom(Name), is_map(Meta) ->
    #config{keyed_by = KeyedBy} = config(Name),
    case erllama_cache_store_key:parts(KeyedBy, Meta) of
        {ok, Namespace, Keyed} ->
            Unit = bytes_per_unit(KeyedBy),
            Lengths = erllama_cache_index:lengths(Name, KeyedBy, byte_size(Keyed) div Unit),
            Ends = [Length * Unit || Length <- Lengths],
            Keys = erllama_cache_store_key:of_prefixes(Namespace, Keyed, Ends),
            longest(Name, KeyedBy, lists:reverse(Lengths), Keys);
        {error, _} = Error ->
            Error
    end.

bytes_per_unit(tokens) -> ?TOKEN_BYTES;
bytes_per_unit(text) -> 1.

%% The keys are those of the lengths in ascending order.
longest(_Name, _KeyedBy, [], <<>>) ->
    miss;
longest(Name, KeyedBy, [Length | Shorter], Keys) ->
    Others = byte_size(Keys) - ?KEY_BYTES,
    <<OtherKeys:Others/binary, Key/binary>> = Keys,
    case erllama_cache_index:row(Name, Key) of
        %% A file of the other version may have the same key: its text is the bytes of the tokens.
        #row{state = present, length = {KeyedBy, Length}} -> {ok, binary:copy(Key), Length};
        _ -> longest(Name, KeyedBy, Shorter, OtherKeys)
    end.

%% @doc Returns what the store holds, and its counts since it started. `files' includes those that
%% no load accepts; `bytes' are those of whole files. `refused' counts loads that found such a file.
%% Exits with `{noproc, _}' when the store does not run.
%%
%% ```
%% #{files := Files, bytes := Bytes, hits := Hits} = erllama_cache_store:info(my_store).
%% '''
-spec info(name()) -> info().
info(Name) when is_atom(Name) ->
    #config{root = Root, tier = Tier, keyed_by = KeyedBy, max_bytes = MaxBytes,
            counters = Counters} = config(Name),
    {Files, Bytes, Reservations} = erllama_cache_index:count(Name),
    Done = [{Counter, counters:get(Counters, Index)} || {Index, Counter} <- enumerate(?COUNTERS)],
    maps:merge(
        #{
            name => Name, root => Root, tier => Tier, keyed_by => KeyedBy, max_bytes => MaxBytes,
            files => Files, bytes => Bytes, reservations => Reservations
        },
        maps:from_list(Done)
    ).

%% @private
%% What the keys of the store of this name are made of, if it runs here.
-spec find_keyed_by(atom()) -> {ok, erllama_cache_host:keyed_by()} | error.
find_keyed_by(Name) ->
    case erllama_cache_index:find_config(Name) of
        {ok, #config{keyed_by = KeyedBy}} -> {ok, KeyedBy};
        _ -> error
    end.

%% @private
%% Who takes files from peers for the store of this name, if it runs here.
-spec find_borrower(atom()) -> {ok, none | #borrower{}} | error.
find_borrower(Name) ->
    case erllama_cache_index:find_config(Name) of
        {ok, #config{borrower = Borrower}} -> {ok, Borrower};
        _ -> error
    end.

enumerate(List) ->
    lists:zip(lists:seq(1, length(List)), List).

config(Name) ->
    erllama_cache_index:config(Name).

count_one(#config{counters = Counters}, Index) ->
    counters:add(Counters, Index, 1).

now_ms() ->
    erlang:system_time(millisecond).

%%% For the writer

%% @private
identify(KeyedBy, #{tokens := Tokens, prompt_text := Text} = Meta) ->
    case {erllama_cache_store_key:namespace(Meta), erllama_cache_meta:encode_tokens(Tokens)} of
        {{error, _} = Error, _} ->
            Error;
        {_, error} ->
            {error, {invalid_meta, tokens}};
        {{ok, {_, QuantByte, _} = Namespace}, Encoded} ->
            Key = case KeyedBy of
                tokens -> erllama_cache_store_key:in(Namespace, Encoded);
                text -> erllama_cache_store_key:in(Namespace, Text)
            end,
            {ok, {Key, QuantByte, {KeyedBy, Encoded, byte_size(Text)}}}
    end.

%% @private
reserve(Name, Tier, Key, Size) ->
    erllama_cache_store_claim:reserve(Name, Tier, Key, Size).

%% @private
root(Name) ->
    (config(Name))#config.root.

%% @private
%% A reservation whose lease has ended stands until another process takes the key.
check(Name, Key, Token) ->
    erllama_cache_index:renew(Name, Key, Token).

%% @private
%% Nothing to remember: if the process dies now, the server looks for a file in any case.
mark_published(Name, Key, Token, _Root) ->
    check(Name, Key, Token).

%% @private
announce(Name, Key, Token, Size, _Header, Content) ->
    Length = case Content of
        {tokens, Tokens, _} -> {tokens, byte_size(Tokens) div ?TOKEN_BYTES};
        {text, _, TextBytes} -> {text, TextBytes}
    end,
    erllama_cache_store_claim:settle(Name, Key, Token, Size, Length).

%% @private
cancel(Name, Key, Token) ->
    erllama_cache_store_claim:cancel(Name, Key, Token).

%% @private
count(Name, {saved, _Reason}) -> count_one(config(Name), ?SAVES);
count(Name, duplicate_dropped) -> count_one(config(Name), ?DUPLICATES);
count(Name, {fetched, Bytes}) ->
    #config{counters = Counters} = Config = config(Name),
    ok = count_one(Config, ?FETCHED),
    counters:add(Counters, ?FETCHED_BYTES, Bytes);
count(Name, fetch_failed) -> count_one(config(Name), ?FETCH_FAILURES);
%% The writer counts those of all stores.
count(_Name, dropped) -> ok.
