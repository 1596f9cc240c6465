%% @doc The application `erllama' as a host: its own modules, called by name. They exist inside
%% `erllama' only.
%%
%% Two kinds of it exist: token-keyed (0.5) and text-keyed (0.10 and later). They differ in what
%% keys are made of and in what they export, by which the kind is recognised.
-module(erllama_cache_host_erllama).
-behaviour(erllama_cache_host).

-export([keyed_by/0, corrupt/2]).
-export([identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).

%% These call modules that exist inside erllama only, which dialyzer reports from OTP 26 on.
-if(?OTP_RELEASE >= 26).
-dialyzer({no_unknown, [identify/2, key/3, corrupt/2, reserve/4, ask_root/2, check/3,
                        mark_published/4, announce/6, cancel/3, count/2]}).
-endif.

%% The slots of erllama's counters that a writer adds to.
-define(SAVES_COLD, 4).
-define(SAVES_CONTINUED, 5).
-define(SAVES_FINISH, 6).
-define(SAVES_EVICT, 7).
-define(SAVES_SHUTDOWN, 8).
-define(CORRUPT_FILES, 10).
-define(DUPLICATE_DROPPED, 16).
-define(SAVES_DROPPED, 20).
-define(SAVES_AGENT_PREFIX, 22).

%% What the kinds export, and only one of them each.
-define(TOKEN_KEYED, [{erllama_cache_key, make, 4}, {erllama_cache_meta_srv, announce_saved, 5}]).
-define(TEXT_KEYED, [{erllama_cache_key, make_text, 4},
                     {erllama_cache_meta_srv, announce_saved, 6}]).

%% The quant byte of all types that the host's table does not name.
-define(NO_KNOWN_TYPE, 255).

%% @private
%% The kind of host that runs here. If it is neither, the error has the functions that it lacks.
-spec keyed_by() ->
    {ok, erllama_cache_host:keyed_by()} | {error, {unknown_host, Missing :: [mfa()]}}.
keyed_by() ->
    case {missing(?TEXT_KEYED), missing(?TOKEN_KEYED)} of
        {[], _} -> {ok, text};
        {_, []} -> {ok, tokens};
        {OfText, OfTokens} -> {error, {unknown_host, OfTokens ++ OfText}}
    end.

missing(Functions) ->
    [MFA || {Module, _, _} = MFA <- Functions, not is_exported(code:ensure_loaded(Module), MFA)].

is_exported({module, _}, {Module, Function, Arity}) ->
    erlang:function_exported(Module, Function, Arity);
is_exported({error, _}, _MFA) ->
    false.

%% @private
%% Key and quant byte are the host's: its table may have grown since this was written, and it could
%% not find a key that was made in another way. The encoding of tokens is the format's, and the
%% library is fast at it: this runs in the process that decodes them.
identify(KeyedBy, #{quant_type := QuantType, tokens := Tokens, prompt_text := Text} = Meta) ->
    case {erllama_cache_key:quant_byte(QuantType), erllama_cache_meta:encode_tokens(Tokens)} of
        {?NO_KNOWN_TYPE, _} ->
            %% The host's parser refuses such a file and deletes it, but its row would stay: the key
            %% would count as saved and never load.
            {error, {unknown_quant_byte, ?NO_KNOWN_TYPE}};
        {_, error} ->
            {error, {invalid_meta, tokens}};
        {QuantByte, Encoded} ->
            {ok, {key(KeyedBy, Meta, Encoded), QuantByte, {KeyedBy, Encoded, byte_size(Text)}}}
    end.

key(tokens, Meta, Encoded) ->
    #{fingerprint := Fingerprint, quant_type := QuantType, ctx_params_hash := CtxParamsHash} = Meta,
    erllama_cache_key:make(Fingerprint, QuantType, CtxParamsHash, Encoded);
key(text, Meta, _Encoded) ->
    #{fingerprint := Fingerprint, quant_type := QuantType, ctx_params_hash := CtxParamsHash,
      prompt_text := Text} = Meta,
    erllama_cache_key:make_text(Fingerprint, QuantType, CtxParamsHash, Text).

%% @private
reserve(_TierSrv, Tier, Key, _Size) ->
    erllama_cache_meta_srv:reserve_save(Key, Tier, self()).

%% @private
%% A tier server's root never changes, but the server answers only when it has read what others
%% load. So each server is asked once. The answer is in a persistent term, which every process reads
%% without a lock or a copy. Replacing one makes the VM scan the heaps of all processes: that is the
%% price of a restart of the server, which is rare.
root(TierSrv) ->
    Server = whereis(TierSrv),
    case persistent_term:get({?MODULE, TierSrv}, none) of
        {Server, Root} -> Root;
        _ -> ask_root(TierSrv, Server)
    end.

ask_root(TierSrv, Server) ->
    try erllama_cache_disk_srv:dir(TierSrv) of
        Root ->
            ok = remember(TierSrv, Server, Root),
            Root
    catch
        %% The caller is the process that decodes tokens: it must neither wait for all those loads
        %% nor die of it.
        exit:{timeout, _} -> {error, tier_busy}
    end.

%% If another server has taken the name meanwhile, either of them may have answered.
remember(TierSrv, Server, Root) ->
    case whereis(TierSrv) of
        Server when is_pid(Server) -> persistent_term:put({?MODULE, TierSrv}, {Server, Root});
        _ -> ok
    end.

%% @private
check(_TierSrv, Key, Token) ->
    erllama_cache_meta_srv:check_reservation(Key, Token).

%% @private
mark_published(_TierSrv, Key, Token, Root) ->
    Path = erllama_cache_path:final(Root, Key),
    erllama_cache_meta_srv:mark_published(Key, Token, Path).

%% @private
announce(_TierSrv, Key, Token, Size, Header, {tokens, Tokens, _TextBytes}) ->
    erllama_cache_meta_srv:announce_saved(Key, Token, Size, Header, Tokens);
announce(_TierSrv, Key, Token, Size, Header, {text, Tokens, TextBytes}) ->
    erllama_cache_meta_srv:announce_saved(Key, Token, Size, Header, Tokens, TextBytes).

%% @private
cancel(_TierSrv, Key, Token) ->
    erllama_cache_meta_srv:cancel_reservation(Key, Token).

%% @private
count(_TierSrv, {saved, unknown}) -> ok;
count(_TierSrv, {saved, cold}) -> erllama_cache_counters:incr(?SAVES_COLD);
count(_TierSrv, {saved, continued}) -> erllama_cache_counters:incr(?SAVES_CONTINUED);
count(_TierSrv, {saved, finish}) -> erllama_cache_counters:incr(?SAVES_FINISH);
count(_TierSrv, {saved, evict}) -> erllama_cache_counters:incr(?SAVES_EVICT);
count(_TierSrv, {saved, shutdown}) -> erllama_cache_counters:incr(?SAVES_SHUTDOWN);
count(_TierSrv, {saved, agent_prefix}) -> erllama_cache_counters:incr(?SAVES_AGENT_PREFIX);
count(_TierSrv, duplicate_dropped) -> erllama_cache_counters:incr(?DUPLICATE_DROPPED);
count(_TierSrv, dropped) -> erllama_cache_counters:incr(?SAVES_DROPPED);
%% erllama has no slots for these.
count(_TierSrv, {fetched, Bytes}) ->
    ok = erllama_cache_counts:count(fetched),
    erllama_cache_counts:count(fetched_bytes, Bytes);
count(_TierSrv, fetch_failed) -> erllama_cache_counts:count(fetch_failures).

%% @private
%% erllama's own load counts so, too.
corrupt(_TierSrv, _Key) ->
    erllama_cache_counters:incr(?CORRUPT_FILES).
