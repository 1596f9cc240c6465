%% @doc The built-in store: KV files in one directory.
%%
%% It is a host for the writer (key, reservation, root), and it loads, deletes and evicts files:
%% those that were not used for the longest time, or those that are used least. Loads and saves run
%% in the calling process. The store's server watches reservations and, in a bounded store, the
%% room.
%%
%% The index is an ETS table of the store's name with one row for each key. It is built from the
%% files' headers when the store starts, and read without the server. The files are the truth:
%% several nodes may share a root, and a load finds what another node has saved.
-module(erllama_cache_store).
-behaviour(erllama_cache_host).

-include("erllama_cache_index.hrl").
-include("erllama_cache_limits.hrl").
-include("erllama_cache_store.hrl").

-export([start_link/2, child_spec/1, child_spec/2]).
-export([save/3, save/4, save_async/3, save_async/4]).
-export([load/2, load/3, delete/2, reject/2, pin/2, unpin/2, member/2, info/2]).
-export([info/1, fold/3, key/1, key/2, longest_prefix/2]).
-export([identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).
-export_type([name/0, options/0, file_info/0, info/0]).

-type name() :: atom().
-type options() :: #{
    root := file:name_all(),
    create => boolean(),
    tier => erllama_cache_host:tier(),
    max_bytes => pos_integer() | infinity,
    min_free_bytes => non_neg_integer(),
    eviction => lru | frecency,
    half_life => pos_integer(),
    ttl => pos_integer() | infinity,
    keyed_by => erllama_cache_host:keyed_by(),
    mac_key => {file, file:name_all()} | fun(() -> <<_:256>>),
    peers => none | atom(),
    peer_timeout => pos_integer(),
    peer_transport => tcp | tls | distribution
}.
%% <ul>
%% <li>`root': the directory, which must exist, or with
%%   `create' (default: `false') is made with all above it, for its owner alone;</li>
%% <li>`tier': the kind of store (default: `disk');</li>
%% <li>`max_bytes': how many bytes its files may take together (default: `infinity');</li>
%% <li>`min_free_bytes': how many bytes of its file system a save leaves free (default: 0, which
%%   asks nobody). Files are evicted for that as for `max_bytes';</li>
%% <li>`eviction': which file goes first when room is needed: the one that was not used for the
%%   longest time (`lru', default), or the one that is used least (`frecency'), where each use
%%   counts half as much after each `half_life', in milliseconds (default: 86400000, a day);</li>
%% <li>`ttl': milliseconds without a use after which a file is removed, at most a tenth of that
%%   later, or a minute (default: `infinity');</li>
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
    expired := non_neg_integer(),
    rejected := non_neg_integer(),
    pinned := non_neg_integer(),
    fetched := non_neg_integer(),
    fetched_bytes := non_neg_integer(),
    fetch_failures := non_neg_integer()
}.

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
%% Options may be a map or a list of pairs. A relative root is resolved against the current
%% directory at this moment, and stays the same when that changes.
%%
%% Errors: a POSIX reason, `badarg' or `{unencodable, Encoding}', of the root. Raises
%% `{missing_option, root}', `{invalid_option, Key, Value}' and `{unknown_option, Key, Nearest}'.
-spec start_link(name(), options() | [{atom(), term()}]) -> {ok, pid()} | {error, term()}.
start_link(Name, Options) when is_list(Options) ->
    start_link(Name, maps:from_list(Options));
start_link(Name, Options) when is_atom(Name), is_map(Options) ->
    #{root := Root, create := Create} = Complete = erllama_cache_config:complete_options(Options),
    case erllama_cache_path:absolute(Root) of
        {ok, Absolute, Path} ->
            Fixed = Complete#{root := Absolute},
            case ensure_root(Absolute, Create) of
                ok -> erllama_cache_store_server:start_link(Name, Path, Fixed);
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% The states hold people's prompts.
ensure_root(_Root, false) ->
    ok;
ensure_root(Root, true) ->
    case filelib:is_dir(Root) of
        true ->
            ok;
        false ->
            case filelib:ensure_path(Root) of
                ok -> file:change_mode(Root, 8#700);
                {error, _} = Error -> Error
            end
    end.

%% @doc Returns a child specification from one argument, as supervisors of Elixir want it: the
%% options with `name'.
%%
%% ```
%% #{id := {erllama_cache_store, my_store}} =
%%     erllama_cache_store:child_spec([{name, my_store}, {root, "/var/cache/kv"}]).
%% '''
-spec child_spec(#{name := name(), atom() => term()} | [{atom(), term()}]) ->
    supervisor:child_spec().
child_spec(Options) when is_list(Options) ->
    child_spec(maps:from_list(Options));
child_spec(#{name := Name} = Options) ->
    child_spec(Name, maps:remove(name, Options)).

%% @doc Returns a child specification for your own supervisor.
%%
%% ```
%% #{start := {erllama_cache_store, start_link, _}} =
%%     erllama_cache_store:child_spec(my_store, #{root => "/var/cache/kv"}).
%% '''
-spec child_spec(name(), options() | [{atom(), term()}]) -> supervisor:child_spec().
child_spec(Name, Options) when is_list(Options) ->
    child_spec(Name, maps:from_list(Options));
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

%%% Saving

%% @doc Saves as {@link save/4}, and waits up to 30 seconds for a slot.
%%
%% ```
%% {ok, Key} = erllama_cache_store:save(my_store, Meta, Payload).
%% '''
-spec save(name(), erllama_cache_meta:build_meta(), Payload :: binary()) ->
    {ok, erllama_cache_writer:key()} | {error, erllama_cache_writer:save_error()}.
save(Name, Meta, Payload) ->
    erllama_cache_writer:save(Name, tier(Name), Meta, Payload).

%% @doc Saves as {@link erllama_cache_writer:save/5} does, in the store's own tier.
%%
%% ```
%% {ok, Key} = erllama_cache_store:save(my_store, Meta, Payload, 5000).
%% '''
-spec save(name(), erllama_cache_meta:build_meta(), Payload :: binary(), timeout()) ->
    {ok, erllama_cache_writer:key()} | {error, erllama_cache_writer:save_error()}.
save(Name, Meta, Payload, Timeout) ->
    erllama_cache_writer:save(Name, tier(Name), Meta, Payload, Timeout).

%% @doc Saves as {@link save_async/4}, with its defaults.
-spec save_async(name(), erllama_cache_meta:build_meta(), Payload :: binary()) ->
    {ok, reference()}.
save_async(Name, Meta, Payload) ->
    save_async(Name, Meta, Payload, #{}).

%% @doc Saves in another process, as {@link erllama_cache_writer:save_async/5} does.
%%
%% ```
%% {ok, Ref} = erllama_cache_store:save_async(my_store, Meta, Payload, #{detach => true}),
%% {ok, _Key} = receive {erllama_cache_writer, Ref, Result} -> Result end.
%% '''
-spec save_async(name(), erllama_cache_meta:build_meta(), Payload :: binary(),
                 erllama_cache_writer:async_opts()) -> {ok, reference()}.
save_async(Name, Meta, Payload, Options) ->
    erllama_cache_writer:save_async(Name, tier(Name), Meta, Payload, Options).

tier(Name) when is_atom(Name) ->
    (config(Name))#config.tier.

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
    Load = fun() -> erllama_cache_store_load:run(Name, Key, Timeout, Peers) end,
    erllama_cache_telemetry:span(load, #{name => Name, key => Key},
                                 {Load, fun erllama_cache_load:described/1}).

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
        Existed when is_boolean(Existed) -> erllama_cache_store_load:gone(Config, Known);
        {error, _} = Error -> Error
    end.

%% @doc Puts the file of a key aside, because a model has refused the state: every byte is what was
%% saved, and yet it is of no use, for it came from another build of the engine, say. Loads miss it
%% from now on, and a save of the key saves anew. The file is called `<key>.kvc.bad'; the last 8 of
%% a root are kept, for a week, and count for none of the store's bounds. `ok' also when nothing is
%% stored. Errors: a POSIX reason.
%%
%% It is about the file that is there: a save of the key that is pending behind its caller still
%% comes, and so does a peer's file of the key with the next load that asks peers.
%%
%% ```
%% {ok, Key} = erllama_cache_store:save(my_store, Meta, Payload),
%% ok = erllama_cache_store:reject(my_store, Key),
%% miss = erllama_cache_store:load(my_store, Key).
%% '''
-spec reject(name(), erllama_cache_writer:key()) -> ok | {error, term()}.
reject(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    erllama_cache_store_reject:put_aside(config(Name), Key).

%% @doc Keeps what is stored under a key, now or later, from being evicted or expiring, for as long
%% as the store runs. What is pinned takes room: when nothing else is left to evict, saves fail with
%% `no_room'. {@link delete/2} and {@link reject/2} remove it, and another store on the same root
%% knows nothing of it.
%%
%% ```
%% {ok, Key} = erllama_cache_store:key(Meta),
%% ok = erllama_cache_store:pin(my_store, Key),
%% ok = erllama_cache_store:unpin(my_store, Key).
%% '''
-spec pin(name(), erllama_cache_writer:key()) -> ok.
pin(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    erllama_cache_index:pin(Name, Key).

%% @doc Ends what {@link pin/2} began; `ok' also when the key is not pinned.
%%
%% ```
%% ok = erllama_cache_store:unpin(my_store, <<1:256>>).
%% '''
-spec unpin(name(), erllama_cache_writer:key()) -> ok.
unpin(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    ok = erllama_cache_index:unpin(Name, Key),
    gen_server:cast(Name, unpinned).

%% @doc Whether there is a state under a key: in a save that is pending, in the index, or on the
%% disk, where another node may have saved it. Nobody has read the file: only a load tells whether
%% it is sound. Errors: a POSIX reason.
%%
%% ```
%% {ok, Key} = erllama_cache_store:save(my_store, Meta, Payload),
%% true = erllama_cache_store:member(my_store, Key),
%% false = erllama_cache_store:member(my_store, <<1:256>>).
%% '''
-spec member(name(), erllama_cache_writer:key()) -> boolean() | {error, term()}.
member(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    #config{path = Path} = config(Name),
    case {erllama_cache_index:row(Name, Key), pending(Name, Key)} of
        {#row{state = present}, _} ->
            true;
        {_, {ok, _Info, _Payload, _Owner}} ->
            true;
        _ ->
            erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:exists(Turn, Path, Key) end)
    end.

pending(Name, Key) ->
    erllama_cache_pending:find(erllama_cache_pending:scope(?MODULE, Name), Key).

%% @doc Returns what describes the payload under a key, without the payload. It is what the file
%% says of itself: only a load checks it.
%%
%% ```
%% {ok, Key} = erllama_cache_store:save(my_store, Meta, Payload),
%% {ok, #{context_size := 4096, save_reason := cold}} = erllama_cache_store:info(my_store, Key).
%% '''
%%
%% Errors as of {@link load/2}.
-spec info(name(), erllama_cache_writer:key()) -> {ok, file_info()} | miss | {error, term()}.
info(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    #config{path = Path, secret = Secret} = config(Name),
    case pending(Name, Key) of
        {ok, Info, _Payload, _Owner} ->
            {ok, Info};
        none ->
            erllama_cache_io_limit:run(fun(Turn) ->
                erllama_cache_nif:describe(Turn, Path, Key, Secret)
            end)
    end.

%% @doc Calls `Fun' for each file that the index knows, in no order: with its key, its size in
%% bytes, and when it was used last, in milliseconds of system time. Files that come and go
%% meanwhile may be left out.
%%
%% ```
%% Bytes = erllama_cache_store:fold(my_store, fun(_Key, #{size := Size}, Sum) -> Size + Sum end, 0).
%% '''
-spec fold(name(), fun((erllama_cache_writer:key(), Row, Acc) -> Acc), Acc) -> Acc when
    Row :: #{size := pos_integer(), last_used := integer()}.
fold(Name, Fun, Acc) when is_atom(Name), is_function(Fun, 3) ->
    %% The caller's own function is called when the table has been read: it may take long, or raise.
    Files = erllama_cache_index:fold(Name, fun
        (#row{state = present, key = Key, size = Size, last_used = LastUsed}, Sofar) ->
            [{Key, #{size => Size, last_used => LastUsed}} | Sofar];
        (_RefusedOrReserved, Sofar) ->
            Sofar
    end, []),
    lists:foldl(fun({Key, File}, Sofar) -> Fun(Key, File, Sofar) end, Acc, Files).

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
            files => Files, bytes => Bytes, reservations => Reservations,
            pinned => length(erllama_cache_index:pinned(Name))
        },
        maps:from_list(Done)
    ).

enumerate(List) ->
    lists:zip(lists:seq(1, length(List)), List).

config(Name) ->
    erllama_cache_index:config(Name).

count_one(#config{counters = Counters}, Index) ->
    counters:add(Counters, Index, 1).

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
