%% The writer's configuration: defaults, the environment, what its values may be.
%%
%% @private
-module(erllama_cache_config).

-export([complete/1, environment/0, erllama_limit/0]).

-include("erllama_cache_limits.hrl").

%% A configuration with defaults for what it leaves out. Raises `{invalid_config, Key, Value}'.
-spec complete(erllama_cache_writer:config()) -> erllama_cache_writer:config().
complete(Config) ->
    Complete = maps:merge(defaults(), Config),
    ok = maps:foreach(fun check/2, Complete),
    Complete.

defaults() ->
    #{
        max_concurrent => erlang:system_info(schedulers) * 2 + 1,
        max_inflight_bytes => infinity,
        host => erllama_cache_host_erllama,
        file_mode => 8#600,
        page_cache => keep,
        slow_save_ms => 10000
    }.

%% What the environment of `erllama_cache_nif' says.
-spec environment() -> erllama_cache_writer:config().
environment() ->
    Keys = [max_concurrent, max_inflight_bytes, host, file_mode, digest, mac_key, page_cache,
            slow_save_ms],
    maps:from_list([
        {Key, Value}
     || Key <- Keys, {ok, Value} <- [application:get_env(erllama_cache_nif, Key)]
    ]).

%% What the environment of `erllama' says, for which this writer may stand in.
-spec erllama_limit() -> erllama_cache_writer:config().
erllama_limit() ->
    case application:get_env(erllama, writer_max_concurrent) of
        {ok, Limit} when ?IS_LIMIT(Limit) -> #{max_concurrent => Limit};
        _ -> #{}
    end.

check(max_concurrent, Limit) when ?IS_LIMIT(Limit) -> ok;
check(max_inflight_bytes, Bytes) when ?IS_BYTES(Bytes) -> ok;
check(host, Host) when is_atom(Host) -> ok;
check(file_mode, Mode) when is_integer(Mode), Mode >= 0, Mode =< 8#777 -> ok;
check(digest, Digest) when Digest =:= blake3; Digest =:= none -> ok;
check(mac_key, {file, _Path}) -> ok;
check(mac_key, Fun) when is_function(Fun, 0) -> ok;
check(page_cache, PageCache) when PageCache =:= keep; PageCache =:= drop -> ok;
check(slow_save_ms, Ms) when is_integer(Ms), Ms > 0 -> ok;
check(mac_key, _Secret) -> error({invalid_config, mac_key, hidden});
check(Key, Value) -> error({invalid_config, Key, Value}).
