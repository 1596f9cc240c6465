%% @doc The configuration of the writer and the options of a store: defaults, the application's
%% environment, what each value may be.
%%
%% A wrong value raises `{invalid_config, Key, Value}', or `{invalid_option, Key, Value}' for a
%% store. An unknown key raises `{unknown_config, Key, Nearest}' or `{unknown_option, Key,
%% Nearest}', with the known key that is spelt most alike.
-module(erllama_cache_config).

-export([complete/1, environment/0, erllama_limit/0, save_options/2]).
-export([complete_options/1, keyed_by/1, load_options/2]).
-export_type([config/0, write_behind/0]).

-include("erllama_cache_limits.hrl").

%% The application's environment: what configures the writer, and the rest.
-define(WRITER, [max_concurrent, max_inflight_bytes, host, file_mode, digest, mac_key, page_cache,
                 slow_save_ms, write_behind, drain_ms | ?PEERS]).
-define(PEERS, [peers, peer_timeout, peer_transport]).
-define(WRITE_BEHIND, [reasons, max, max_bytes, save_bytes, slot_ms, share]).
-define(APPLICATION, [stores, start_writer]).
-define(OPTIONS, [root, create, tier, max_bytes, min_free_bytes, eviction, half_life, ttl, mac_key,
                  keyed_by | ?PEERS]).
%% Milliseconds.
-define(DAY, 86400000).

-type config() :: #{
    max_concurrent => pos_integer(),
    max_inflight_bytes => non_neg_integer() | infinity,
    host => module(),
    file_mode => non_neg_integer(),
    digest => blake3 | none,
    mac_key => {file, file:name_all()} | fun(() -> <<_:256>>),
    page_cache => keep | drop,
    slow_save_ms => pos_integer(),
    write_behind => off | write_behind(),
    drain_ms => non_neg_integer(),
    peers => none | atom(),
    peer_timeout => pos_integer(),
    peer_transport => tcp | tls | distribution
}.
%% The writer's configuration.
%% <ul>
%% <li>`max_concurrent': how many saves run at once (default: twice the schedulers plus one);</li>
%% <li>`max_inflight_bytes': bytes of payload in running saves (default: `infinity');</li>
%% <li>`host': the {@link erllama_cache_host} (default: `erllama_cache_host_erllama');</li>
%% <li>`file_mode': the files' permissions (default: `8#600');</li>
%% <li>`digest': `blake3' (default in tier `disk') or `none' (default in tier `ram_file');</li>
%% <li>`mac_key': a secret that keys all digests; with one, every file has a digest;</li>
%% <li>`page_cache': whether a saved file stays in the page cache (default: `keep');</li>
%% <li>`slow_save_ms': a save that takes longer is logged (default: 10,000);</li>
%% <li>`write_behind': which saves go on behind their callers (default: `off', none);</li>
%% <li>`drain_ms': how long the application waits for those when it stops (default: 30,000);</li>
%% <li>`peers', `peer_timeout', `peer_transport': inside erllama, the group of nodes whose tier
%%   servers lend each other files, and how, as of a store: see {@link erllama_cache_reader:fetch/3}
%%   (default: `none', 50 and `tcp').</li>
%% </ul>

-type write_behind() :: #{
    reasons => [erllama_cache_meta:save_reason()],
    max => pos_integer(),
    max_bytes => pos_integer(),
    save_bytes => pos_integer(),
    slot_ms => timeout(),
    share => 1..100
}.
%% Which saves go on behind their callers.
%% <ul>
%% <li>`reasons': the reasons of saves that go on behind their callers (default: `cold',
%%   `continued', `finish' and `agent_prefix'); all others are in line;</li>
%% <li>`max': how many may be pending (default: 16);</li>
%% <li>`max_bytes': bytes of payload that those may hold (default: 4 GiB);</li>
%% <li>`save_bytes': a larger payload is saved in line (default: 256 MiB);</li>
%% <li>`slot_ms': milliseconds that a save of another reason waits for a slot, where its own timeout
%%   is shorter (default: 30,000);</li>
%% <li>`share': the percentage of one processor that such a save takes while it writes a payload of
%%   more than 256 KiB, unless it has waited for its slot (default: 33).</li>
%% </ul>

%%% The writer

%% @private
%% A configuration with defaults for what it leaves out.
-spec complete(config()) -> config().
complete(Config) ->
    ok = check_keys(Config, ?WRITER, unknown_config),
    Complete = maps:merge(defaults(), Config),
    ok = check_values(Complete, invalid_config),
    #{write_behind := WriteBehind} = Complete,
    Complete#{write_behind := complete_write_behind(WriteBehind)}.

complete_write_behind(off) ->
    off;
complete_write_behind(Given) ->
    ok = check_keys(Given, ?WRITE_BEHIND, unknown_config),
    Complete = maps:merge(write_behind_defaults(), Given),
    ok = maps:foreach(
        fun(Key, Value) ->
            is_valid_behind(Key, Value) orelse error({invalid_config, {write_behind, Key}, Value})
        end,
        Complete
    ),
    Complete.

write_behind_defaults() ->
    #{
        reasons => [cold, continued, finish, agent_prefix],
        max => 16,
        max_bytes => 4 bsl 30,
        save_bytes => 256 bsl 20,
        slot_ms => 30000,
        share => 33
    }.

is_valid_behind(reasons, Reasons) -> erllama_cache_meta:are_reasons(Reasons);
is_valid_behind(max, Max) -> ?IS_LIMIT(Max);
is_valid_behind(slot_ms, Ms) -> ?IS_TIMEOUT(Ms);
is_valid_behind(share, Share) -> is_integer(Share) andalso Share > 0 andalso Share =< 100;
is_valid_behind(_Bytes, Bytes) -> is_integer(Bytes) andalso ?IS_BYTES(Bytes).

defaults() ->
    #{
        max_concurrent => erlang:system_info(schedulers) * 2 + 1,
        max_inflight_bytes => infinity,
        host => erllama_cache_host_erllama,
        file_mode => 8#600,
        page_cache => keep,
        slow_save_ms => 10000,
        write_behind => off,
        drain_ms => 30000,
        peers => none,
        peer_timeout => 50,
        peer_transport => tcp
    }.

%% @private
%% The writer's part of this application's environment.
-spec environment() -> config().
environment() ->
    %% OTP itself adds this key.
    Set = lists:keydelete(included_applications, 1, application:get_all_env(erllama_cache_nif)),
    Environment = maps:from_list(Set),
    ok = check_keys(Environment, ?WRITER ++ ?APPLICATION, unknown_config),
    maps:with(?WRITER, Environment).

%% @private
%% The limit that erllama is configured to: inside erllama, this writer takes the place of its own.
-spec erllama_limit() -> config().
erllama_limit() ->
    case application:get_env(erllama, writer_max_concurrent) of
        {ok, Limit} when ?IS_LIMIT(Limit) -> #{max_concurrent => Limit};
        _ -> #{}
    end.

%% @private
%% How the library writes files, by tier: those of saves in line, and those of saves behind their
%% callers.
-spec save_options(
    #{file_mode := non_neg_integer(), page_cache := keep | drop, write_behind := off | map(),
      atom() => term()},
    none | erllama_cache_nif:secret()
) -> #{options | options_behind => #{
    erllama_cache_host:tier() => erllama_cache_nif:save_options()
}}.
save_options(#{write_behind := off} = Config, Secret) ->
    #{options => save_options(Config, Secret, helped)};
save_options(#{write_behind := #{share := Share}} = Config, Secret) ->
    #{options => save_options(Config, Secret, helped),
      options_behind => save_options(Config, Secret, Share)}.

save_options(#{file_mode := Mode, page_cache := PageCache} = Config, Secret, Effort) ->
    Digest = fun(Default) ->
        case Secret of
            none -> maps:get(digest, Config, Default);
            %% No load would accept a file without a keyed digest.
            _ -> Secret
        end
    end,
    #{
        disk => {Mode, Digest(blake3), PageCache, Effort},
        ram_file => {Mode, Digest(none), PageCache, Effort}
    }.

%%% A store

%% @private
%% Options with defaults for what they leave out.
-spec complete_options(erllama_cache_store:options()) -> erllama_cache_store:options().
complete_options(Options) when not is_map_key(root, Options) ->
    error({missing_option, root});
complete_options(Options) ->
    ok = check_keys(Options, ?OPTIONS, unknown_option),
    Complete = maps:merge(default_options(), Options),
    ok = check_values(Complete, invalid_option),
    Complete.

default_options() ->
    Defaults = #{create => false, tier => disk, max_bytes => infinity, min_free_bytes => 0,
                 eviction => lru, half_life => ?DAY, ttl => infinity, keyed_by => tokens,
                 peers => none, peer_timeout => 50, peer_transport => tcp},
    case application:get_env(erllama_cache_nif, mac_key) of
        {ok, Source} -> Defaults#{mac_key => Source};
        undefined -> Defaults
    end.

%% @private
%% What keys are made of, from some options or by default.
-spec keyed_by(#{keyed_by => erllama_cache_host:keyed_by()}) -> erllama_cache_host:keyed_by().
keyed_by(Options) ->
    ok = check_keys(Options, [keyed_by], unknown_option),
    ok = check_values(Options, invalid_option),
    maps:get(keyed_by, Options, tokens).

%% @private
%% Options of a load, and these defaults for what they leave out.
-spec load_options(Options, Defaults) -> Complete when
    Options :: #{atom() => term()}, Defaults :: #{atom() => term()},
    Complete :: #{atom() => term()}.
load_options(Options, Defaults) ->
    ok = check_keys(Options, maps:keys(Defaults), unknown_option),
    ok = check_values(Options, invalid_option),
    maps:merge(Defaults, Options).

%%% Both

check_values(Values, Invalid) ->
    maps:foreach(
        fun(Key, Value) ->
            Shown = case Key of
                mac_key -> hidden;
                _ -> Value
            end,
            is_valid(Key, Value) orelse error({Invalid, Key, Shown})
        end,
        Values
    ).

is_valid(max_concurrent, Limit) -> ?IS_LIMIT(Limit);
is_valid(max_inflight_bytes, Bytes) -> ?IS_BYTES(Bytes);
is_valid(host, Host) -> is_atom(Host);
is_valid(file_mode, Mode) -> is_integer(Mode) andalso Mode >= 0 andalso Mode =< 8#777;
is_valid(digest, Digest) -> Digest =:= blake3 orelse Digest =:= none;
is_valid(mac_key, {file, _Path}) -> true;
is_valid(mac_key, Fun) -> is_function(Fun, 0);
is_valid(page_cache, PageCache) -> PageCache =:= keep orelse PageCache =:= drop;
is_valid(slow_save_ms, Ms) -> is_integer(Ms) andalso Ms > 0;
is_valid(write_behind, WriteBehind) -> WriteBehind =:= off orelse is_map(WriteBehind);
is_valid(drain_ms, Ms) -> is_integer(Ms) andalso ?IS_TIMEOUT(Ms);
%% Whether it is a path, its encoding and the system say.
is_valid(root, _Root) -> true;
is_valid(create, Create) -> is_boolean(Create);
is_valid(tier, Tier) -> Tier =:= disk orelse Tier =:= ram_file;
is_valid(timeout, Timeout) -> ?IS_TIMEOUT(Timeout);
is_valid(wait, Timeout) -> ?IS_TIMEOUT(Timeout);
is_valid(peers, Group) -> is_atom(Group);
is_valid(peer_transport, tls) -> erllama_cache_peer_tls:is_configured();
is_valid(peer_transport, Transport) -> Transport =:= tcp orelse Transport =:= distribution;
is_valid(peer_timeout, Ms) -> is_integer(Ms) andalso Ms > 0 andalso ?IS_TIMEOUT(Ms);
is_valid(keyed_by, KeyedBy) -> KeyedBy =:= tokens orelse KeyedBy =:= text;
is_valid(min_free_bytes, Bytes) -> is_integer(Bytes) andalso Bytes >= 0;
is_valid(eviction, Eviction) -> Eviction =:= lru orelse Eviction =:= frecency;
is_valid(half_life, Ms) -> is_integer(Ms) andalso Ms > 0;
is_valid(ttl, Ms) -> Ms =:= infinity orelse (is_integer(Ms) andalso Ms > 0);
is_valid(max_bytes, Bytes) -> Bytes =:= infinity orelse (is_integer(Bytes) andalso Bytes > 0).

check_keys(Given, Known, Unknown) ->
    case maps:keys(maps:without(Known, Given)) of
        [] -> ok;
        [Key | _] -> error({Unknown, Key, nearest(Key, Known)})
    end.

nearest(Key, Known) ->
    Spelt = spelt(Key),
    {_, Nearest} = lists:min([{distance(Spelt, atom_to_list(Each)), Each} || Each <- Known]),
    Nearest.

spelt(Key) when is_atom(Key) ->
    atom_to_list(Key);
spelt(Key) ->
    try unicode:characters_to_list(Key) of
        Spelt when is_list(Spelt) -> Spelt;
        _Malformed -> ""
    catch
        error:badarg -> ""
    end.

%% How many characters have to be inserted, removed or replaced to make the one of the other
%% (Levenshtein's distance), a row of Wagner and Fischer's matrix at a time.
distance(From, To) ->
    lists:last(lists:foldl(fun(Char, Row) -> next_row(Char, To, Row) end,
                           lists:seq(0, length(To)), From)).

next_row(Char, To, [Corner | Above]) ->
    {Row, _} = lists:mapfoldl(
        fun({Other, Up}, {Left, Diagonal}) ->
            Replaced = case Char of
                Other -> Diagonal;
                _ -> Diagonal + 1
            end,
            Least = lists:min([Left + 1, Up + 1, Replaced]),
            {Least, {Least, Up}}
        end,
        {Corner + 1, Corner},
        lists:zip(To, Above)
    ),
    [Corner + 1 | Row].
