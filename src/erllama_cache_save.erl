%% One save, from the metadata to the announcement: the host computes a key and reserves room, the
%% library writes and publishes slice by slice, and the host announces the file. docs/design/save.md
%% has the order and its reasons.
%%
%% A save in line is prepared, reserved and finished by its caller, which has a slot by then. A save
%% behind its caller is prepared by that, and reserved and finished by a process of its own, which
%% waits for a slot in between.
%%
%% @private
-module(erllama_cache_save).

-export([early_root/2, run/7]).
-export([prepare/5, reserve/1, without_rest/1, finish/3, renew_reservation/1]).
-export([subject/1, payload/1, info/1, scope/1, count/2, counted/4]).
-export_type([save/0, stop/0]).

-include("erllama_cache_log.hrl").

%% Up to this many bytes of file, a save is one call of the library.
-define(ONE_CALL, 65536).
%% What every file has but its prompt, texts, tokens and payload: the fixed fields, and the tags
%% that are always written, with a digest or without.
-define(FIXED_BYTES, 180).
-define(DIGEST_BYTES, 38).
%% What a text costs beside its bytes, unless it is empty and left out.
-define(TAG_BYTES, 5).

%% What stops a save before its file has its name: for one in line, nothing; for one in the
%% background, `{Ref, Monitors}', a message that cancels it and, unless it is detached, its caller's
%% death; for one behind its caller, nothing, not even the host's end.
-type stop() :: never | {reference(), [reference()]} | behind.

%% One save: what it is about, and how far it is.
-record(save, {
    host :: module(),
    tier_srv :: erllama_cache_host:tier_srv(),
    tier :: erllama_cache_host:tier(),
    key :: erllama_cache_writer:key(),
    content :: erllama_cache_host:content(),
    plan :: erllama_cache_nif:save_plan(),
    payload :: binary(),
    size :: pos_integer(),
    %% Of the reservation, once there is one.
    token :: undefined | erllama_cache_host:token(),
    %% As the host has it, and as the system wants it.
    root :: undefined | file:name_all(),
    path :: undefined | erllama_cache_nif:root(),
    %% When the lease was renewed last.
    renewed :: undefined | integer(),
    %% Once there is one; it need not hold a slot.
    guard :: undefined | erllama_cache_nif:guard(),
    stop = never :: stop(),
    %% The temporary file, once there is one: whether more of it is to be written.
    tmp :: undefined | erllama_cache_nif:tmp(),
    progress = more :: ok | more
}).
-opaque save() :: #save{}.

%% For a save that has no slot yet: what its setup is to have beside the writer's. A detached one
%% finds the root now. When its turn comes, erllama may be stopping, and a tier server stops before
%% the writer.
-spec early_root(erllama_cache_host:tier_srv(), stop()) ->
    #{root => {file:name_all(), erllama_cache_nif:root()}}.
early_root(TierSrv, {_Ref, []}) ->
    try
        {ok, Setup} = erllama_cache_setup:find(),
        {Host, _KeyedBy} = host(TierSrv, Setup),
        {ok, Root, Path} = erllama_cache_host:locate(Host, TierSrv),
        #{root => {Root, Path}}
    catch
        %% The save will ask again, and fail as one in line does.
        _:_ -> #{}
    end;
early_root(_TierSrv, _Stop) ->
    #{}.

%% A save in line, or in the background: one that has its slot.
-spec run(erllama_cache_setup:setup(), erllama_cache_nif:guard(), erllama_cache_host:tier_srv(),
          erllama_cache_host:tier(), erllama_cache_meta:build_meta(), Payload :: binary(),
          stop()) ->
    {ok, erllama_cache_writer:key()} | {error, term()}.
run(Setup, Guard, TierSrv, Tier, BuildMeta, Payload, Stop) ->
    case prepare(Setup, TierSrv, Tier, BuildMeta, Payload) of
        {ok, Save} ->
            case reserve(Save) of
                {ok, Reserved} -> finish(Reserved, Guard, Stop);
                {error, conflict} -> conflict(Save);
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% A key that is being saved behind its caller counts as saved.
conflict(#save{key = Key} = Save) ->
    case erllama_cache_pending:find(scope(Save), Key) of
        none ->
            {error, conflict};
        {ok, _Info, _Payload, _Owner} ->
            ok = count(duplicate_dropped, Save),
            {error, already_present}
    end.

%% What is to be saved, under which key. This needs neither a slot nor a reservation, and leaves
%% nothing behind. The list of tokens is not part of it: their encoding is.
-spec prepare(erllama_cache_setup:setup(), erllama_cache_host:tier_srv(),
              erllama_cache_host:tier(), erllama_cache_meta:build_meta(), Payload :: binary()) ->
    {ok, save()} | {error, term()}.
prepare(#{options := Options, defaults := Defaults} = Setup, TierSrv, Tier, BuildMeta, Payload) ->
    {Host, KeyedBy} = host(TierSrv, Setup),
    case identify(Host, KeyedBy, BuildMeta, Defaults) of
        {ok, Meta, {Key, QuantByte, {_, Tokens, _} = Content}} ->
            #{Tier := SaveOptions} = Options,
            {Root, Path} = maps:get(root, Setup, {undefined, undefined}),
            {ok, #save{
                root = Root, path = Path,
                host = Host, tier_srv = TierSrv, tier = Tier, key = Key, content = Content,
                plan = {Key, KeyedBy, Meta#{tokens := []}, QuantByte, Tokens, SaveOptions},
                payload = Payload, size = file_size(Meta, Tokens, SaveOptions, Payload)
            }};
        {error, _} = Error ->
            Error
    end.

identify(Host, KeyedBy, BuildMeta, Defaults) ->
    case erllama_cache_meta:complete(KeyedBy, BuildMeta, Defaults) of
        {ok, Meta} ->
            case Host:identify(KeyedBy, Meta) of
                {ok, Identity} -> {ok, Meta, Identity};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% Reserves the key for the calling process, which owns the save from here on, and finds the root.
-spec reserve(save()) -> {ok, save()} | {error, term()}.
reserve(#save{host = Host, tier_srv = TierSrv, tier = Tier, key = Key, size = Size} = Save) ->
    case Host:reserve(TierSrv, Tier, Key, Size) of
        {ok, Token} ->
            Now = erlang:monotonic_time(millisecond),
            steps([fun find_root/1], Save#save{token = Token, renewed = Now});
        {error, already_present} = Error ->
            ok = count(duplicate_dropped, Save),
            Error;
        {error, _} = Error ->
            Error
    end.

%% Writes, publishes and announces what is reserved. The slot that the guard holds, if any, stays
%% taken while the library writes, even if this process is killed.
-spec finish(save(), erllama_cache_nif:guard(), stop()) ->
    {ok, erllama_cache_writer:key()} | {error, term()}.
finish(Save, Guard, Stop) ->
    steps([fun begin_write/1, fun write/1, fun publish/1], Save#save{guard = Guard, stop = Stop}).

%% For a save that waits: keeps its reservation.
-spec renew_reservation(save()) -> ok | {lost, {error, expired}}.
renew_reservation(Save) ->
    check(Save).

%% What a save is about.
-spec subject(save()) ->
    {erllama_cache_host:tier_srv(), erllama_cache_writer:key(), erllama_cache_meta:save_reason()}.
subject(#save{tier_srv = TierSrv, key = Key, plan = Plan}) ->
    {TierSrv, Key, save_reason(Plan)}.

save_reason({_Key, _KeyedBy, #{save_reason := Reason}, _QuantByte, _Tokens, _Options}) ->
    Reason.

%% The same save, one that takes all of its processor if it is behind its caller.
-spec without_rest(save()) -> save().
without_rest(#save{plan = Plan} = Save) ->
    case element(6, Plan) of
        {Mode, Digest, PageCache, Share} when is_integer(Share) ->
            Save#save{plan = setelement(6, Plan, {Mode, Digest, PageCache, 100})};
        _Helped ->
            Save
    end.

-spec payload(save()) -> binary().
payload(#save{payload = Payload}) -> Payload.

%% Where the key is reserved: with the host, or with the store of this name.
-spec scope(save()) -> erllama_cache_pending:scope().
scope(#save{host = Host, tier_srv = TierSrv}) ->
    erllama_cache_pending:scope(Host, TierSrv).

-spec count(erllama_cache_host:event(), save()) -> ok.
count(Event, #save{host = Host, tier_srv = TierSrv}) ->
    Host:count(TierSrv, Event).

%% What a load of this save's file gives beside the payload.
-spec info(save()) -> erllama_cache_store:file_info().
info(#save{plan = {_Key, KeyedBy, Meta, QuantByte, Tokens, _Options}, size = Size}) ->
    #{quant_type := Type} = Meta,
    Fields = maps:with(
        [save_reason, quant_bits, fingerprint, fingerprint_mode, ctx_params_hash, context_size,
         creation_time, last_used_time, hit_count, prompt_text, hostname, erllama_version,
         save_reason_detail], Meta),
    Fields#{
        version => case KeyedBy of tokens -> 1; text -> 2 end,
        %% The file has the byte only, and a load names it by this table.
        quant_type => case erllama_cache_nif:quant_byte(Type) of
            QuantByte -> Type;
            _ -> undefined
        end,
        quant_byte => QuantByte,
        tokens => Tokens,
        file_size => Size
    }.

%% Runs a save that was granted its slot after a wait, counts it, and logs a slow one. Times are
%% native.
-spec counted(fun(() -> Result), {erllama_cache_host:tier_srv(), Bytes :: non_neg_integer()},
              Begun :: integer(), Granted :: integer()) -> Result when
    Result :: {ok, erllama_cache_writer:key()} | {error, term()}.
counted(Save, {TierSrv, Bytes} = Subject, Begun, Granted) ->
    Counted = fun() -> erllama_cache_counts:counting_raised(Save) end,
    Result = erllama_cache_telemetry:span(save, #{name => TierSrv}, {Counted, fun(Ended) ->
        {#{bytes => Bytes, wait => Granted - Begun}, described(Ended)}
    end}),
    ok = ended(Result, Subject, microseconds(Granted - Begun),
               microseconds(erlang:monotonic_time() - Granted)),
    Result.

described({ok, Key}) -> #{result => ok, key => Key};
described({error, Reason}) -> #{result => Reason}.

ended(Result, {TierSrv, Bytes}, Waited, Took) ->
    ok = erllama_cache_counts:save_ended(Result, Bytes, Waited, Took),
    {ok, #{slow_save_ms := Slow}} = erllama_cache_setup:find(),
    case Result of
        {ok, Key} when Took > Slow * 1000 ->
            ?LOG_WARNING(#{
                event => slow_save, tier_srv => TierSrv, key => erllama_cache_log:hex(Key),
                payload_bytes => Bytes, save_ms => Took div 1000, waited_ms => Waited div 1000
            }, ?LOG_META);
        _ ->
            ok
    end.

microseconds(Native) ->
    erlang:convert_time_unit(Native, native, microsecond).

%% Beside erllama a node may have stores: each of them is its own host.
host(TierSrv, #{host := Host, keyed_by := KeyedBy}) when
    Host =:= erllama_cache_host_erllama; Host =:= erllama_cache_store
->
    case erllama_cache_store_lookup:keyed_by(TierSrv) of
        {ok, KeyedByOfStore} -> {erllama_cache_store, KeyedByOfStore};
        error -> {Host, KeyedBy}
    end;
host(_TierSrv, #{host := Host, keyed_by := KeyedBy}) ->
    {Host, KeyedBy}.

%% docs/reference/format.md has the layout.
file_size(#{prompt_text := Prompt, hostname := Hostname, erllama_version := Version,
            save_reason_detail := Detail}, Tokens, {_Mode, Digest, _PageCache, _Help},
          Payload) ->
    Digested = case Digest of
        none -> 0;
        _ -> ?DIGEST_BYTES
    end,
    Texts = [?TAG_BYTES + byte_size(Text) || Text <- [Hostname, Version, Detail], Text =/= <<>>],
    ?FIXED_BYTES + Digested + lists:sum(Texts) + byte_size(Prompt) + byte_size(Tokens) +
        byte_size(Payload).

%% Takes the steps of a save whose reservation is ours. Whatever ends it before the file is
%% published drops the temporary file and cancels the reservation, unless that was lost: then it
%% belongs to another save.
steps([], Save) ->
    {ok, Save};
steps([Step | Steps], Save) ->
    try Step(Save) of
        {next, Next} ->
            steps(Steps, Next);
        {published, {ok, Outcome, Size, Header}, Published} ->
            ok = count_outcome(Outcome),
            announce(Size, Header, Published);
        {lost, Error} ->
            ok = drop_tmp(Save),
            Error;
        {error, _} = Error ->
            ok = drop_tmp(Save),
            cancel_reservation(Save),
            Error
    catch
        Class:Reason:Stack ->
            ok = drop_tmp(Save),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

%% If a call of the library failed, the file is gone already, and this does nothing.
drop_tmp(#save{tmp = undefined}) -> ok;
drop_tmp(#save{tmp = Tmp}) -> erllama_cache_nif:abort(Tmp).

find_root(#save{path = undefined, host = Host, tier_srv = TierSrv} = Save) ->
    case erllama_cache_host:locate(Host, TierSrv) of
        {ok, Root, Path} -> {next, Save#save{root = Root, path = Path}};
        {error, _} = Error -> Error
    end;
find_root(Save) ->
    {next, Save}.

begin_write(#save{path = Path} = Save) ->
    begun(first_call(Path, Save), Save).

begun({ok, _Outcome, _Size, _Header} = Published, Save) ->
    {published, Published, Save};
begun({Progress, Tmp}, Save) when Progress =:= ok; Progress =:= more ->
    {next, Save#save{tmp = Tmp, progress = Progress}};
begun(Ended, _Save) ->
    Ended.

first_call(Path, #save{size = Size} = Save) when Size =< ?ONE_CALL ->
    %% A change to a dirty scheduler and back takes longer than the write of a few pages, so one
    %% call does it all; the reservation, milliseconds old, is checked before it.
    case check(Save) of
        ok -> write_and_publish(Path, Save);
        {lost, _} = Lost -> Lost
    end;
first_call(Path, #save{guard = Guard, plan = Plan, payload = Payload} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_tmp(Turn, Guard, Path, Plan, Payload)
    end).

write_and_publish(Path, #save{tier = ram_file, guard = Guard, plan = Plan,
                              payload = Payload} = Save) ->
    case erllama_cache_nif:write_and_publish_in_memory(Guard, Path, Plan, Payload) of
        on_device -> write_and_publish(Path, Save#save{tier = disk});
        Written -> Written
    end;
write_and_publish(Path, #save{guard = Guard, plan = Plan, payload = Payload} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_and_publish(Turn, Guard, Path, Plan, Payload)
    end).

%% Writes the rest, a slice at a time, and checks the reservation before the file is published.
write(#save{stop = Stop, progress = Progress} = Save) ->
    case stopped(Stop) of
        true ->
            {error, cancelled};
        false when Progress =:= ok ->
            case check(Save) of
                ok -> {next, Save};
                {lost, _} = Lost -> Lost
            end;
        false ->
            case write_slice(Save) of
                {next, Next} -> write(Next);
                Ended -> Ended
            end
    end.

write_slice(#save{guard = Guard, tmp = Tmp, payload = Payload} = Save) ->
    case renew(Save) of
        {lost, _} = Lost ->
            Lost;
        Renewed ->
            Slice = fun(Turn) -> erllama_cache_nif:write_more(Turn, Guard, Tmp, Payload) end,
            case in_turn(Save, Slice) of
                Progress when is_atom(Progress) -> {next, Renewed#save{progress = Progress}};
                Ended -> Ended
            end
    end.

publish(Save) ->
    published(in_turn(Save, publish_call(Save)), Save).

published(more, Save) ->
    Renewed = renew_if_it_stands(Save),
    Meanwhile = fun() ->
        _ = renew_if_it_stands(Renewed),
        ok
    end,
    published(in_turn_while(Meanwhile, publish_call(Renewed)), Renewed);
published({ok, _Outcome, _Size, _Header} = Published, Save) ->
    {published, Published, Save};
published(Ended, _Save) ->
    Ended.

publish_call(#save{guard = Guard, tmp = Tmp}) ->
    fun(Turn) -> erllama_cache_nif:publish(Turn, Guard, Tmp) end.

%% A call of the library in its turn. On a slow disk the turn may be long in coming: the lease is
%% renewed meanwhile. If it is lost then, the call is not made.
in_turn(Save, Call) ->
    in_turn_while(fun() -> check(Save) end, Call).

in_turn_while(Meanwhile, Call) ->
    case erllama_cache_io_limit:run(Call, erllama_cache_host:renew_every(), Meanwhile) of
        {gave_up, Lost} -> Lost;
        Result -> Result
    end.

%% A disk that takes longer than the lease must not lose a save that goes well.
renew(#save{renewed = Renewed} = Save) ->
    Now = erlang:monotonic_time(millisecond),
    case Now - Renewed < erllama_cache_host:renew_every() orelse check(Save) of
        true -> Save;
        ok -> Save#save{renewed = Now};
        {lost, _} = Lost -> Lost
    end.

check(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token} = Save) ->
    case ask(fun() -> Host:check(TierSrv, Key, Token) end, Save) of
        ok -> ok;
        {error, _} = Error -> {lost, Error}
    end.

%% The file may have its name already. Whether the reservation was lost, or the host does not
%% answer, is for mark_published to say.
renew_if_it_stands(Save) ->
    try renew(Save) of
        {lost, _} -> Save;
        Renewed -> Renewed
    catch
        _:_ -> Save
    end.

%% A call of the host. If writer and host have been stopped, a save that nobody waits for goes on
%% without them: its file has its key as name, and the host finds it when it starts again.
ask(Call, #save{stop = Stop}) ->
    try
        Call()
    catch
        exit:Reason:Stack ->
            case outlives_host(Stop) andalso whereis(erllama_cache_writer) =:= undefined of
                true -> ok;
                false -> erlang:raise(exit, Reason, Stack)
            end
    end.

outlives_host(behind) -> true;
outlives_host({_Ref, []}) -> true;
outlives_host(_Stop) -> false.

%% Whether a save must stop, because it was cancelled or its caller has died.
stopped(Stop) when Stop =:= never; Stop =:= behind ->
    false;
stopped({Ref, []}) ->
    receive
        {erllama_cache_writer, cancel, Ref} -> true
    after 0 -> false
    end;
stopped({Ref, [Monitor]}) ->
    receive
        {erllama_cache_writer, cancel, Ref} -> true;
        {'DOWN', Monitor, process, _, _} -> true
    after 0 -> false
    end.

count_outcome(linked) -> ok;
count_outcome(adopted) -> erllama_cache_counts:count(adoptions);
count_outcome(replaced) -> erllama_cache_counts:count(replacements).

%% The file stays from here on, whatever the host answers: it is whole, and the host adopts it.
announce(Size, Header, #save{host = Host, tier_srv = TierSrv, key = Key, token = Token,
                             root = Root, content = Content, plan = Plan} = Save) ->
    Answer =
        case ask(fun() -> Host:mark_published(TierSrv, Key, Token, Root) end, Save) of
            ok ->
                ask(fun() -> Host:announce(TierSrv, Key, Token, Size, Header, Content) end, Save);
            {error, _} = Expired ->
                Expired
        end,
    case Answer of
        ok ->
            ok = ask(fun() -> count({saved, save_reason(Plan)}, Save) end, Save),
            {ok, Key};
        {error, _} = Error ->
            Error
    end.

cancel_reservation(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    ok = Host:cancel(TierSrv, Key, Token).

%% The caller has to see the first exception. A host that cannot cancel either has no reservation to
%% leave behind, or forgets it when this process dies or its lease ends.
cancel_after_exception(Save) ->
    try
        cancel_reservation(Save)
    catch
        _:_ -> ok
    end.
