%% @doc What is saved beside a payload: the `build_meta' map, its check and its defaults.
-module(erllama_cache_meta).

-export([complete/2, are_tokens/1]).
-export_type([build_meta/0, complete/0, save_reason/0, fingerprint_mode/0, defaults/0, invalid/0]).

-type save_reason() :: unknown | cold | continued | evict | shutdown | finish.
-type fingerprint_mode() :: safe | gguf_chunked | fast_unsafe.

-type build_meta() :: #{
    save_reason := save_reason(),
    quant_bits := byte(),
    fingerprint := <<_:256>>,
    fingerprint_mode := fingerprint_mode(),
    quant_type := atom(),
    ctx_params_hash := <<_:256>>,
    tokens := [integer()],
    context_size := 0..16#ffffffff,
    creation_time => non_neg_integer(),
    last_used_time => non_neg_integer(),
    hit_count => 0..16#ffffffff,
    prompt_text => binary(),
    hostname => binary(),
    erllama_version => binary(),
    save_reason_detail => binary(),
    atom() => term()
}.
%% Tokens are stored modulo 2^32 each. Times are unix seconds, now by default. Hostname and version
%% default to this machine's and to that of the application `erllama'. Other keys are ignored.

-type complete() :: build_meta().
%% A map with every key there and of its type.

-type defaults() :: #{hostname := binary()}.
-type invalid() :: {missing_key | invalid_meta, Key :: atom()}.

-define(REQUIRED, [save_reason, quant_bits, fingerprint, fingerprint_mode, quant_type,
                   ctx_params_hash, tokens, context_size]).
-define(U32, 16#ffffffff).
-define(U64, 16#ffffffffffffffff).

%% @doc Checks a map and fills in its defaults. That the tokens are integers, in a proper list, is
%% left to whoever encodes them, who walks the list anyway.
-spec complete(map(), defaults()) -> {ok, complete()} | {error, invalid()}.
complete(Meta, Defaults) ->
    case [Key || Key <- ?REQUIRED, not is_map_key(Key, Meta)] of
        [Key | _] -> {error, {missing_key, Key}};
        [] -> check(maps:merge(defaults(Meta, Defaults), Meta))
    end.

%% @doc Whether these can be encoded.
-spec are_tokens(list()) -> boolean().
are_tokens([Token | Rest]) when is_integer(Token) -> are_tokens(Rest);
are_tokens([]) -> true;
are_tokens(_) -> false.

check(Meta) ->
    Iterator = maps:iterator(Meta),
    check(maps:next(Iterator), Meta).

check(none, Meta) ->
    {ok, Meta};
check({Key, Value, Iterator}, Meta) ->
    case is_valid(Key, Value) of
        true -> check(maps:next(Iterator), Meta);
        false -> {error, {invalid_meta, Key}}
    end.

is_valid(save_reason, Value) ->
    lists:member(Value, [unknown, cold, continued, evict, shutdown, finish]);
is_valid(fingerprint_mode, Value) ->
    lists:member(Value, [safe, gguf_chunked, fast_unsafe]);
is_valid(quant_bits, Value) ->
    is_unsigned(Value, 255);
is_valid(quant_type, Value) ->
    is_atom(Value);
is_valid(tokens, Value) ->
    is_list(Value);
is_valid(Key, Value) when Key =:= fingerprint; Key =:= ctx_params_hash ->
    is_binary(Value) andalso byte_size(Value) =:= 32;
is_valid(Key, Value) when Key =:= context_size; Key =:= hit_count ->
    is_unsigned(Value, ?U32);
is_valid(Key, Value) when Key =:= creation_time; Key =:= last_used_time ->
    is_unsigned(Value, ?U64);
is_valid(Key, Value) when Key =:= prompt_text; Key =:= hostname; Key =:= erllama_version;
                          Key =:= save_reason_detail ->
    is_binary(Value);
is_valid(_Other, _Value) ->
    true.

is_unsigned(Value, Max) ->
    is_integer(Value) andalso Value >= 0 andalso Value =< Max.

defaults(Meta, #{hostname := Hostname}) ->
    Now = erlang:system_time(second),
    #{
        creation_time => Now,
        last_used_time => Now,
        hit_count => 0,
        prompt_text => <<>>,
        hostname => Hostname,
        erllama_version => version(Meta),
        save_reason_detail => <<>>
    }.

%% Looked up for each save that needs it: the host may be loaded later than the writer.
version(#{erllama_version := Version}) ->
    Version;
version(_Meta) ->
    case application:get_key(erllama, vsn) of
        {ok, Vsn} -> unicode:characters_to_binary(Vsn);
        undefined -> <<"unknown">>
    end.
