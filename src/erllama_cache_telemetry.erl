%% @doc Events for the library `telemetry', if the node has it.
%%
%% There is nothing to configure and no dependency: when the first writer or store starts, this
%% looks once whether `telemetry' is there. If not, an event costs one look into a persistent term.
%%
%% All events are called `[erllama_cache, What, stop]', or `exception' in the place of `stop' when
%% something was raised. Durations are native, as the library's conventions have it.
%%
%% <table>
%% <tr><td>`save'</td><td>`duration' from the slot to the end, `wait' for the slot, `bytes' of
%%   payload</td><td>`name', the store's or the tier server's; `result'; `key' where the result is
%%   `ok'</td></tr>
%% <tr><td>`load'</td><td>`duration', `bytes' of payload</td><td>`name', `key', `result'</td></tr>
%% <tr><td>`wait'</td><td>`duration' of a wait for slots</td><td>`weight', `result'</td></tr>
%% <tr><td>`evict'</td><td>`bytes' of the file</td><td>`name', `key'</td></tr>
%% <tr><td>`fetch'</td><td>`duration', `bytes' of the file</td><td>`name', `key', `peer',
%%   `result'</td></tr>
%% </table>
%%
%% A result is `ok', `miss', or the error's reason. Of what was raised, the metadata has `kind',
%% `reason' and `stacktrace'.
%%
%% @private
-module(erllama_cache_telemetry).

-export([setup/0, event/3, span/3]).

-type what() :: save | load | wait | evict | fetch.
-type measurements() :: #{atom() => integer()}.
-type metadata() :: #{atom() => term()}.

%% Looks for the library. Its code is there from the start of a release, whoever attaches handlers.
-spec setup() -> ok.
setup() ->
    case persistent_term:get(?MODULE, unknown) of
        unknown ->
            Found = case code:ensure_loaded(telemetry) of
                {module, Module} -> Module;
                {error, _} -> none
            end,
            persistent_term:put(?MODULE, Found);
        _ ->
            ok
    end.

%% Something has ended. The fun is called only where somebody may listen.
-spec event(what(), stop | exception, fun(() -> {measurements(), metadata()})) -> ok.
event(What, Suffix, Details) ->
    case persistent_term:get(?MODULE, none) of
        none ->
            ok;
        Module ->
            %% The library raises where its application does not run, and what has been done is not
            %% to fail by that.
            try
                {Measurements, Metadata} = Details(),
                Module:execute([erllama_cache, What, Suffix], Measurements, Metadata)
            catch
                _:_ -> ok
            end
    end.

%% Runs `Fun' and says how long it took; `Describe' makes measurements and metadata of its result.
-spec span(what(), metadata(), {Fun, Describe}) -> Result when
    Fun :: fun(() -> Result), Describe :: fun((Result) -> {measurements(), metadata()}).
span(What, Metadata, {Fun, Describe}) ->
    case persistent_term:get(?MODULE, none) of
        none -> Fun();
        _ -> measured(What, Metadata, Fun, Describe)
    end.

measured(What, Metadata, Fun, Describe) ->
    Begun = erlang:monotonic_time(),
    try Fun() of
        Result ->
            Duration = erlang:monotonic_time() - Begun,
            ok = event(What, stop, fun() ->
                {Measurements, More} = Describe(Result),
                {Measurements#{duration => Duration}, maps:merge(Metadata, More)}
            end),
            Result
    catch
        Kind:Reason:Stack ->
            Duration = erlang:monotonic_time() - Begun,
            Raised = #{kind => Kind, reason => Reason, stacktrace => Stack},
            ok = event(What, exception, fun() ->
                {#{duration => Duration}, maps:merge(Metadata, Raised)}
            end),
            erlang:raise(Kind, Reason, Stack)
    end.
