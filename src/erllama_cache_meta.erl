%% @doc The `build_meta' map, which describes a payload: its types, checks and defaults.
-module(erllama_cache_meta).

-export([complete/3, check_identity/2, encode_tokens/1, are_reasons/1]).
-export_type([build_meta/0, complete/0, identity/0, save_reason/0, fingerprint_mode/0, defaults/0,
              invalid/0]).

-type save_reason() :: unknown | cold | continued | evict | shutdown | finish | agent_prefix.
%% `agent_prefix', the static start of an agent's prompts, exists only where keys are made of text.
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
    hostname => binary() | undefined,
    erllama_version => binary() | undefined,
    save_reason_detail => binary() | undefined,
    atom() => term()
}.
%% Each token is stored modulo 2^32. Times are Unix seconds and default to the present. `hostname'
%% defaults to this machine's name, `erllama_version' to the version of the application `erllama'.
%% `undefined' means the same as no key. Other keys are ignored.

-type identity() :: #{
    fingerprint := <<_:256>>,
    quant_type := atom(),
    ctx_params_hash := <<_:256>>,
    tokens => [integer()],
    prompt_text => binary(),
    atom() => term()
}.
%% The fields that make a key, either `tokens' or `prompt_text' among them, with or without the rest
%% of a `build_meta'.

-type complete() :: build_meta().
%% A map that has every key, each of its type.

-type defaults() :: #{hostname := binary()}.
-type invalid() :: {missing_key | invalid_meta, Key :: atom()}.

-define(REQUIRED, [save_reason, quant_bits, fingerprint, fingerprint_mode, quant_type,
                   ctx_params_hash, tokens, context_size]).
-define(UNDEFINABLE, [hostname, erllama_version, save_reason_detail]).
-define(IDENTITY, [fingerprint, quant_type, ctx_params_hash]).
-define(U32, 16#ffffffff).
-define(U64, 16#ffffffffffffffff).

-define(IS_UNSIGNED(Value, Max), (is_integer(Value) andalso Value >= 0 andalso Value =< Max)).
-define(IS_REASON(Value),
        (Value =:= unknown orelse Value =:= cold orelse Value =:= continued orelse
         Value =:= evict orelse Value =:= shutdown orelse Value =:= finish orelse
         Value =:= agent_prefix)).
-define(IS_MODE(Value),
        (Value =:= safe orelse Value =:= gguf_chunked orelse Value =:= fast_unsafe)).

%% @doc Checks a map and fills in its defaults. Whether the tokens are a proper list of integers is
%% checked when they are encoded, which walks the list anyway.
-spec complete(erllama_cache_host:keyed_by(), map(), defaults()) ->
    {ok, complete()} | {error, invalid()}.
complete(tokens, #{save_reason := agent_prefix}, _Defaults) ->
    {error, {invalid_meta, save_reason}};
complete(_KeyedBy, Meta, Defaults) ->
    complete(Meta, Defaults).

complete(Meta, Defaults) ->
    Complete = maps:merge(defaults(Meta, Defaults), Meta),
    case is_complete(Complete) of
        true ->
            {ok, Complete};
        false ->
            case without_undefined(Meta) of
                Meta -> why_not(Meta, Complete);
                Given -> complete(Given, Defaults)
            end
    end.

%% As erllama's own writer does.
without_undefined(Meta) ->
    maps:filter(
        fun(Key, Value) -> Value =/= undefined orelse not lists:member(Key, ?UNDEFINABLE) end, Meta
    ).

why_not(Meta, Complete) ->
    case [Key || Key <- ?REQUIRED, not is_map_key(Key, Meta)] of
        [Key | _] -> {error, {missing_key, Key}};
        [] -> check(Complete)
    end.

%% All that check/1 asks of a map, in one match, for speed: every save passes here.
is_complete(#{
    save_reason := Reason, fingerprint_mode := Mode, quant_bits := QuantBits,
    quant_type := QuantType,
    fingerprint := <<_:256>>, ctx_params_hash := <<_:256>>, tokens := Tokens,
    context_size := ContextSize, creation_time := Created, last_used_time := Used,
    hit_count := Hits, prompt_text := Prompt, hostname := Hostname, erllama_version := Version,
    save_reason_detail := Detail
}) when
    ?IS_REASON(Reason), ?IS_MODE(Mode), ?IS_UNSIGNED(QuantBits, 255), is_atom(QuantType),
    is_list(Tokens), ?IS_UNSIGNED(ContextSize, ?U32), ?IS_UNSIGNED(Created, ?U64),
    ?IS_UNSIGNED(Used, ?U64), ?IS_UNSIGNED(Hits, ?U32), is_binary(Prompt), is_binary(Hostname),
    is_binary(Version), is_binary(Detail)
->
    true;
is_complete(_Meta) ->
    false.

%% @doc Checks those fields of a map that make its key, and no others. Whether the tokens are
%% integers is checked when they are encoded, as in {@link complete/3}.
-spec check_identity(erllama_cache_host:keyed_by(), map()) -> ok | {error, invalid()}.
check_identity(KeyedBy, Meta) ->
    Identity = identity(KeyedBy),
    case [Key || Key <- Identity, not is_map_key(Key, Meta)] of
        [Key | _] ->
            {error, {missing_key, Key}};
        [] ->
            case check(maps:with(Identity, Meta)) of
                {ok, _} -> ok;
                {error, _} = Error -> Error
            end
    end.

identity(tokens) -> ?IDENTITY ++ [tokens];
identity(text) -> ?IDENTITY ++ [prompt_text].

%% @doc The tokens as a file has them: u32 little-endian each, modulo 2^32. `error' for what is not
%% a proper list of integers.
-spec encode_tokens(Tokens :: term()) -> binary() | error.
encode_tokens(Tokens) ->
    %% More tokens than a NIF may encode on a normal scheduler, and integers beyond 64 bits, are
    %% rare enough for Erlang.
    case erllama_cache_nif:encode_tokens(Tokens) of
        error -> encode_tokens_slowly(Tokens);
        Encoded -> Encoded
    end.

encode_tokens_slowly(Tokens) ->
    case are_tokens(Tokens) of
        true -> <<<<Token:32/little>> || Token <- Tokens>>;
        false -> error
    end.

are_tokens([Token | Rest]) when is_integer(Token) -> are_tokens(Rest);
are_tokens([]) -> true;
are_tokens(_) -> false.

%% @doc Whether these are reasons of saves: a proper list of them.
-spec are_reasons(term()) -> boolean().
are_reasons([Reason | Rest]) when ?IS_REASON(Reason) -> are_reasons(Rest);
are_reasons([]) -> true;
are_reasons(_) -> false.

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
    ?IS_REASON(Value);
is_valid(fingerprint_mode, Value) ->
    ?IS_MODE(Value);
is_valid(quant_bits, Value) ->
    ?IS_UNSIGNED(Value, 255);
is_valid(quant_type, Value) ->
    is_atom(Value);
is_valid(tokens, Value) ->
    is_list(Value);
is_valid(Key, Value) when Key =:= fingerprint; Key =:= ctx_params_hash ->
    is_binary(Value) andalso byte_size(Value) =:= 32;
is_valid(Key, Value) when Key =:= context_size; Key =:= hit_count ->
    ?IS_UNSIGNED(Value, ?U32);
is_valid(Key, Value) when Key =:= creation_time; Key =:= last_used_time ->
    ?IS_UNSIGNED(Value, ?U64);
is_valid(Key, Value) when Key =:= prompt_text; Key =:= hostname; Key =:= erllama_version;
                          Key =:= save_reason_detail ->
    is_binary(Value);
is_valid(_Other, _Value) ->
    true.

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

%% Looked up for each save that needs it, since the host may be loaded after the writer.
version(#{erllama_version := Version}) ->
    Version;
version(_Meta) ->
    case application:get_key(erllama, vsn) of
        {ok, Vsn} -> unicode:characters_to_binary(Vsn);
        undefined -> <<"unknown">>
    end.
